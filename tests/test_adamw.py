"""bitsandbytes' 8-bit AdamW over what is trainable: it trains, its moments are 8 bits, what cannot be is refused."""
from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

from pefttools.adamw import adamw

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def test_adamw_8bit_trains_and_is_close_to_torch():
    torch.manual_seed(0)
    model = nn.Linear(256, 64)
    model.bias.requires_grad_(False)
    other = copy.deepcopy(model)
    x, y = torch.randn(32, 256), torch.randn(32, 64)
    losses = {}
    for name, it, optimizer in (("8 bits", model, adamw(model, lr=1e-2, weight_decay=0.01)),
                                ("torch", other, torch.optim.AdamW([other.weight], lr=1e-2, weight_decay=0.01))):
        for _ in range(10):
            optimizer.zero_grad()
            loss = (it(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            losses.setdefault(name, []).append(loss.item())
        if name == "8 bits":
            state = optimizer.state[model.weight]
            assert state["state1"].dtype == state["state2"].dtype == torch.uint8
            assert model.bias not in optimizer.state
            own = sum(t.nbytes for key, t in state.items() if torch.is_tensor(t) and "qmap" not in key)
            assert own / model.weight.numel() == pytest.approx(2.03, abs=0.005)
    assert losses["8 bits"][-1] < 0.8 * losses["8 bits"][0]
    assert losses["8 bits"] == pytest.approx(losses["torch"], rel=0.02)


def test_adamw_small_tensors_and_32_bits_keep_float32_moments():
    for model, bits in ((nn.Linear(8, 8), 8), (nn.Linear(256, 64), 32)):
        optimizer = adamw(model, lr=1e-2, bits=bits)
        model(torch.ones(1, model.in_features)).sum().backward()
        optimizer.step()
        assert optimizer.state[model.weight]["state1"].dtype == torch.float32


def test_adamw_refuses_what_cannot_be():
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="paged=True needs a GPU"):
        adamw(model, lr=1e-3, paged=True)
    with pytest.raises(ValueError, match="bits must be 8 or 32.*got 4"):
        adamw(model, lr=1e-3, bits=4)
    with pytest.raises(ValueError, match="no parameter of this model is trainable"):
        adamw(model.requires_grad_(False), lr=1e-3)


def test_adamw_without_bitsandbytes_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="pip install bitsandbytes.*torch.optim.AdamW"):
        adamw(nn.Linear(4, 4), lr=1e-3)
