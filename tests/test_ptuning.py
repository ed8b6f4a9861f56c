"""P-tuning: the encoder against peft's, folding it away, its count. Whole models are in test_virtual.py."""
from __future__ import annotations

import copy

import pytest
import torch

from pefttools.inject import attach, count_parameters, trainable
from pefttools.ptuning import PTuning, PTuningConfig

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def both(kind, length=4, d=6, hidden=5, layers=2, dropout=0.0, dtype=torch.float32):
    from peft import PromptEncoder, PromptEncoderConfig

    ours = PTuning(length, d, hidden, kind, layers, dropout).to(dtype)
    theirs = PromptEncoder(PromptEncoderConfig(
        num_virtual_tokens=length, token_dim=d, num_transformer_submodules=1, encoder_hidden_size=hidden,
        encoder_reparameterization_type=kind, encoder_num_layers=layers, encoder_dropout=dropout)).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("kind, layers", [("MLP", 2), ("LSTM", 1), ("LSTM", 2), ("LSTM", 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_encoder_and_gradients_are_pefts(kind, layers, dtype):
    ours, theirs = both(kind, layers=layers, dtype=dtype)
    got, expected = ours(), theirs(torch.arange(4)[None])[0]
    assert torch.equal(got, expected)
    for output in (got, expected):
        (output * torch.linspace(-1, 1, output.numel(), dtype=dtype).view_as(output)).sum().backward()
    for (key, mine), its in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, msg=key)
        assert mine.grad.any(), key


def test_the_lstms_dropout_is_pefts_and_not_in_what_is_saved():
    ours, theirs = both("LSTM", dropout=0.5)
    torch.manual_seed(0)
    got = ours()
    torch.manual_seed(0)
    assert torch.equal(got, theirs(torch.arange(4)[None])[0]) and not torch.equal(got, ours())
    saved = ours.to_save()
    assert ours.training and torch.equal(saved, ours.to_save())
    torch.testing.assert_close(saved, ours.eval()())


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_gradcheck_in_float64(kind):
    module = PTuning(3, 4, 3, kind, 1).double()
    names, values = zip(*((name, p.detach().clone().requires_grad_()) for name, p in module.named_parameters()))
    assert torch.autograd.gradcheck(lambda *v: torch.func.functional_call(module, dict(zip(names, v)), ()), values)


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_folded_it_says_the_same_from_its_vectors_alone(kind, small_model, small_inputs):
    model = attach(small_model("llama"), PTuningConfig(4, hidden=8, kind=kind))
    inputs = small_inputs("llama")
    before, parameter = model(**inputs).logits, model.prompt_encoder["default"].embedding.weight
    model.prompt_encoder["default"].fold()
    torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-5, atol=1e-6)
    assert set(trainable(model)) == {"prompt_encoder.default.embedding.weight"}
    after, state = model(**inputs).logits, copy.deepcopy(model.prompt_encoder.state_dict())
    model.prompt_encoder["default"].fold()
    assert torch.equal(model(**inputs).logits, after) and list(state) == ["default.embedding.weight"]
    assert model.prompt_encoder["default"].embedding.weight is parameter


def test_count_with_and_without_the_encoder(small_model):
    model = attach(small_model("llama"), PTuningConfig(20))
    d = 32
    assert count_parameters(model)[0] == 20 * d + 3 * (d * d + d)
    model.prompt_encoder["default"].fold()
    assert count_parameters(model)[0] == 20 * d
    with torch.device("meta"):
        encoder = PTuning(20, 2048, 2048)
    assert sum(p.numel() for p in encoder.parameters()) == 12_630_016 and 20 * 2048 == 40_960


@pytest.mark.parametrize("options, message", [({"kind": "GRU"}, "one of MLP, LSTM"), ({"hidden": 0}, "hidden=0"),
                                              ({"layers": 0}, "layers=0"), ({"dropout": 1.0}, "dropout=1.0"),
                                              ({"length": -1}, "-1")])
def test_settings_that_make_no_sense_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PTuningConfig(**options)
