"""Every storage is entered once, with its bytes, from its first moment to its last."""
from __future__ import annotations

import pytest
import torch
from torch import nn

from pefttools.vram.ledger import FOREVER, Ledger
from pefttools.vram.sums import run_engine


def meta(*shape, dtype=torch.float32, grad=False):
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=grad)


def alive(ledger):
    return sum(life.bytes for life in ledger.lives if life.died == FOREVER)


def test_new_storages_are_counted_and_views_are_not():
    with Ledger() as ledger:
        x = meta(10, 4)
        y = x.view(4, 10).t()
        z = x[2:] + 1
    assert [life.bytes for life in ledger.lives] == [160, 128]
    assert (y.shape, z.shape) == ((10, 4), (8, 4))


def test_a_storage_lives_until_its_last_view_is_gone():
    with Ledger() as ledger:
        x = meta(100)
        y = x[:1]
        del x
        assert alive(ledger) == 400
        del y
        assert alive(ledger) == 0
    assert ledger.lives[0].born < ledger.lives[0].died < FOREVER


def test_in_place_and_out_make_nothing_new():
    x, out = meta(10), meta(10)
    with Ledger() as ledger:
        ledger.see(x), ledger.see(out)
        before = len(ledger.lives)
        x.mul_(2)
        torch.add(x, 1, out=out)
    assert len(ledger.lives) == before


def test_a_storage_that_grows_ends_and_begins_again():
    x = meta(10)
    with Ledger() as ledger:
        ledger.see(x)
        x.resize_(1000)
        assert alive(ledger) == 4000
    assert [life.bytes for life in ledger.lives] == [40, 4000]
    assert ledger.lives[0].died <= ledger.lives[1].born


def test_memory_of_the_host_is_not_entered():
    with Ledger() as ledger:
        host = torch.ones(5) + 1
        copied = meta(7).to("cpu")
    assert [life.bytes for life in ledger.lives] == [28] and host is not None and copied is not None


def test_kept_for_backward_or_temporary():
    layer = nn.Linear(8, 8, bias=False, device="meta")
    with Ledger() as ledger:
        ledger.begin("forward")
        ledger.enter("layer")
        hidden = layer(meta(3, 8)).exp()                       # exp keeps its result; linear's own result is let go
        ledger.leave()
        ledger.begin("backward")
        run_engine(hidden.sum())
        del hidden
    terms = {life.op: Ledger.term_of(life) for life in ledger.lives if life.phase == "forward"}
    assert terms["aten.exp.default"] == "activations"
    assert terms["aten.mm.default"] == "temporary"
    assert {life.where for life in ledger.lives if life.op == "aten.exp.default"} == {"layer"}


def test_as_wide_as_the_vocabulary_is_logits():
    with Ledger(vocab=61) as ledger:
        kept = meta(4, 61), meta(4, 60)
    assert [Ledger.term_of(life) for life in ledger.lives] == ["logits", "temporary"] and kept


def test_the_engine_adds_a_second_gradient_in_place_as_on_a_gpu():
    with Ledger() as ledger:
        y = meta(50, grad=True) * 2
        loss = (y + y.relu().relu()).exp().sum()               # y's two gradients: the first has one holder
        ledger.begin("backward")
        run_engine(loss)
    assert not [life for life in ledger.lives if life.op == "aten.add.Tensor" and life.phase == "backward"]


def test_a_gradient_that_somebody_else_holds_is_not_overwritten():
    with Ledger() as ledger:
        y = meta(50, grad=True) * 2
        loss = (y + y).exp().sum()                             # both gradients are one tensor
        ledger.begin("backward")
        run_engine(loss)
    assert [life for life in ledger.lives if life.op == "aten.add.Tensor" and life.phase == "backward"]


@pytest.mark.parametrize("condition, expected", [("all", True), ("any", False)], ids=["all", "any"])
def test_questions_for_values_have_the_answers_of_an_ordinary_run(condition, expected):
    with Ledger():
        assert bool(getattr(meta(3) == 0, condition)()) is expected
        assert meta(3).sum().item() == 1.0
