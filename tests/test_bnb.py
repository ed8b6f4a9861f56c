"""bitsandbytes made safe: each fault is worked around where it exists, and is what docs/upstream says it is.

A test of a work-around does what a reader does (evaluate, then train) and would fail without it; `test_the_fault…`
shows that, on processors that have the fault, and skips with the reason on others.
"""
from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pefttools import bnb
from pefttools.bnb import Faults, dequantize, find_faults, make_safe

pytest.importorskip("bitsandbytes")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
REPORT = Path(__file__).parents[1] / "docs" / "upstream" / "bitsandbytes_cpu.md"


def skip_without(fault: str) -> None:
    if not getattr(find_faults(), fault):
        pytest.skip(f"this processor, with this bitsandbytes, does not have the fault {fault!r}")


def linear4bit(d_in=64, d_out=64, bias=False, compute_dtype=torch.float32, dtype=torch.float32, double=False, seed=0,
               block=64, kind="nf4"):
    from bitsandbytes.nn import Linear4bit, Params4bit

    generator = torch.Generator().manual_seed(seed)
    layer = Linear4bit(d_in, d_out, bias=bias, compute_dtype=compute_dtype, quant_type=kind)
    weight = (torch.randn(d_out, d_in, generator=generator) * torch.logspace(-1, 1, d_out)[:, None]).to(dtype)
    layer.weight = Params4bit(weight, requires_grad=False, quant_type=kind, blocksize=block, compress_statistics=double,
                              module=layer)
    return layer.to("cpu")


def by_hand(weight) -> torch.Tensor:
    """Dequantization from its definition, one code at a time: no kernel of anybody's."""
    from bitsandbytes.functional import dequantize_blockwise

    state = weight.quant_state
    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    codes = [nibble for byte in weight.data.view(-1).tolist() for nibble in (byte >> 4, byte & 15)]
    values = state.code[torch.tensor(codes[:state.shape.numel()])]
    scales = absmax.repeat_interleave(state.blocksize)[:len(values)]
    return (values * scales).view(state.shape)


def relative(got, expected) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def model_of(*layers) -> nn.Module:
    return nn.Sequential(*layers)


# ------------------------------------------------------------------------------------------------ finding

def test_faults_are_found_where_the_processor_has_them():
    found = find_faults()
    assert isinstance(found, Faults)
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        pytest.skip("no /proc/cpuinfo: nothing to compare with")
    import bitsandbytes

    if bitsandbytes.__version__ != "0.50.2":
        pytest.skip("only 0.50.2 is known to have them")
    words = set(re.search(r"^(?:flags|Features)\s*:(.*)$", flags.read_text(), re.M).group(1).split())
    assert found.gradients_lost == found.eval_in_bf16 == ("avx512_bf16" in words)
    assert found.widths_wrong == ("avx512f" in words)


def test_thresholds():
    fine = Faults(False, 3e-7, 0.092)
    assert not fine.eval_in_bf16 and not fine.widths_wrong
    bad = Faults(True, 0.0029, 0.28)
    assert bad.eval_in_bf16 and bad.widths_wrong
    assert Faults(False, 0.0, float("nan")).widths_wrong


# ------------------------------------------------------------------------------------------------ gradients after eval

def train(model, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model.train()(x) - 1).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses


def trained_after_eval(safe: bool, evaluate: bool = True):
    """A trainable layer below a frozen 4-bit one, so that its gradient has to pass through the latter."""
    torch.manual_seed(0)
    model = model_of(nn.Linear(64, 64), linear4bit(double=True))
    if safe:
        make_safe(model)
    if evaluate:
        with torch.no_grad():
            model.eval()(torch.randn(2, 64))
    losses = train(model)
    return losses, model[0].weight.grad


def test_training_after_an_evaluation_is_training_without_one():
    losses, gradient = trained_after_eval(safe=True)
    expected, expected_gradient = trained_after_eval(safe=True, evaluate=False)
    assert losses == expected and losses[-1] < losses[0]
    assert torch.equal(gradient, expected_gradient) and gradient.abs().sum() > 0


def test_the_fault_lost_gradients_is_there_without_make_safe():
    skip_without("gradients_lost")
    losses, gradient = trained_after_eval(safe=False)
    assert gradient is None or not gradient.any()


def test_peft_lora_learns_after_an_evaluation():
    import peft

    torch.manual_seed(0)
    model = model_of(linear4bit(seed=1), linear4bit(seed=2))
    model.is_loaded_in_4bit = True
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False))
    assert type(model.base_model.model[0]).__name__ == "Linear4bit"
    make_safe(model)
    x = torch.randn(3, 64)
    with torch.no_grad():
        model.eval()(x)
    model.train()(x).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(gradients) == 4 and all(g is not None and g.any() for g in gradients)


# ------------------------------------------------------------------------------------------------ numerics of eval

@pytest.mark.parametrize("double", [False, True])
def test_eval_computes_in_compute_dtype(double):
    layer = make_safe(linear4bit(256, 64, double=double))
    x = torch.randn(5, 256)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), layer.train()(x))
    assert relative(layer.eval()(x), x @ by_hand(layer.weight).T) < 1e-6


def test_the_fault_eval_in_bf16_is_there_without_make_safe():
    skip_without("eval_in_bf16")
    layer, x = linear4bit(256, 64), torch.randn(5, 256)
    with torch.no_grad():
        trained = layer.train()(x)
        assert relative(layer.eval()(x), trained) > 1e-4


def test_eval_of_any_size_runs():
    for d_in, d_out in ((64, 48), (96, 64), (100, 7)):
        layer = make_safe(linear4bit(d_in, d_out))
        assert layer.eval()(torch.randn(2, d_in)).shape == (2, d_out)


# ------------------------------------------------------------------------------------------------ any in_features

@settings(max_examples=40, deadline=None)
@given(d_in=st.integers(1, 40).map(lambda n: 8 * n), d_out=st.integers(1, 9), double=st.booleans(),
       block=st.sampled_from([64, 128, 256]), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
       kind=st.sampled_from(["nf4", "fp4"]))
def test_dequantize_is_right_for_any_width(d_in, d_out, double, block, dtype, kind):
    layer = linear4bit(d_in, d_out, double=double, block=block, dtype=dtype, kind=kind)
    got = dequantize(layer.weight)
    assert got.dtype == dtype and torch.equal(got, by_hand(layer.weight).to(dtype))
    if d_in % block == 0:
        from bitsandbytes.functional import dequantize_4bit

        assert torch.equal(got, dequantize_4bit(layer.weight.data, layer.weight.quant_state))


def test_dequantize_odd_widths_and_dtypes():
    layer = linear4bit(15, 7)
    assert torch.equal(dequantize(layer.weight), by_hand(layer.weight))
    layer = linear4bit(96, 64)
    assert torch.equal(dequantize(layer.weight.data, layer.weight.quant_state), by_hand(layer.weight))
    assert torch.equal(dequantize(layer.weight, dtype=torch.float64), by_hand(layer.weight).double())
    assert torch.equal(dequantize(layer.weight, dtype=torch.bfloat16), by_hand(layer.weight).bfloat16())
    with pytest.raises(ValueError, match="not quantized yet"):
        dequantize(nn.Parameter(torch.randn(4, 4)))


@pytest.mark.parametrize("d_in", [32, 48, 96, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_layers_of_any_width_compute_rightly(d_in, bias):
    from bitsandbytes.nn import Linear4bit

    layer = make_safe(linear4bit(d_in, 64, bias=bias, double=True))
    assert isinstance(layer, Linear4bit) and type(layer) is bnb.SafeLinear4bit
    weight = by_hand(layer.weight)
    x = torch.randn(2, 3, d_in, requires_grad=True)
    for mode in (layer.train(), layer.eval()):
        y = mode(x)
        assert relative(y, x @ weight.T + (layer.bias if bias else 0)) < 1e-6
    if bias:
        layer.bias.requires_grad_()
    direction = torch.randn_like(y)
    layer(x).backward(direction)
    assert relative(x.grad, direction @ weight) < 1e-6
    if bias:
        assert relative(layer.bias.grad, direction.sum((0, 1))) < 1e-6
    low = linear4bit(d_in, 64, bias=bias, compute_dtype=torch.bfloat16)
    y = make_safe(low)(x.detach())
    assert y.dtype == torch.float32 and relative(y, x @ dequantize(low.weight).T + (low.bias if bias else 0)) < 0.01


def test_the_fault_wrong_widths_is_there_without_make_safe():
    skip_without("widths_wrong")
    layer, x = linear4bit(96, 64), torch.randn(2, 96)
    assert relative(layer.train()(x), x @ by_hand(layer.weight).T) > 0.1


def test_a_safe_layer_can_be_copied_pickled_and_found_by_peft():
    import peft

    layer = make_safe(linear4bit(96, 64))
    x = torch.randn(2, 96)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is type(layer) and torch.equal(other(x), layer(x))
    model = model_of(layer)
    model.is_loaded_in_4bit = True       # as transformers sets it
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
    assert type(adapted.base_model.model[0]).__name__ == "Linear4bit"
    assert torch.equal(adapted(x), layer(x))


# ------------------------------------------------------------------------------------------------ repacked already

@pytest.mark.parametrize("double", [False, True])
def test_a_repacked_layer_is_refused_or_put_back(double):
    skip_without("gradients_lost")
    layer = linear4bit(256, 64, double=double)
    before, packed, x = by_hand(layer.weight), layer.weight.data.clone(), torch.randn(2, 256)
    model = model_of(layer)
    with torch.no_grad():
        model.eval()(x)
    with pytest.raises(ValueError, match=r"1 of 1 Linear4bit .*'0'.*Load the model again.*unpack=True"):
        make_safe(model)
    with pytest.raises(ValueError, match="repacked"):
        dequantize(layer.weight)
    make_safe(model, unpack=True)
    assert torch.equal(layer.weight.data, packed)
    after = by_hand(layer.weight)
    worst = ((after - before).abs() / before.abs().clamp(min=1e-30))[before != 0].max().item()
    assert 0 < worst <= 2 ** -8 + 1e-6
    assert torch.equal(model.eval()(x), model.train()(x)) and relative(model(x), x @ after.T) < 1e-6
    assert torch.equal(dequantize(layer.weight), after)
    keys = layer.state_dict()
    assert keys["weight.absmax"].shape == (256,) and keys["weight.absmax"].dtype == torch.float32


def test_make_safe_twice_is_once_and_other_models_pass():
    model = model_of(linear4bit(), linear4bit(96, 64), nn.ReLU())
    assert make_safe(make_safe(model)) is model
    assert not any(layer.support_avx512bf16_for_cpu for layer in list(model)[:2])
    plain = model_of(nn.Linear(3, 3))
    assert make_safe(plain) is plain
    with pytest.raises(TypeError, match="must be a torch module"):
        make_safe("llama")


def test_load_base_makes_what_it_quantizes_safe():
    from transformers import BitsAndBytesConfig

    from pefttools.lab import load_base

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = load_base("tiny", device="cpu", quantization_config=config, quiet=True).model
    layers = [module for module in model.modules() if bnb._is_linear4bit(module)]
    assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_importing_it_imports_nothing_heavy():
    code = "import sys, pefttools.bnb; print(sorted({'bitsandbytes', 'peft', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------ the report

def blocks() -> list[tuple[str, str]]:
    """(program, what it prints) of every block of the report."""
    found = re.findall(r"```(\w*)\n(.*?)```", REPORT.read_text(), re.S)
    assert [kind for kind, _ in found] == ["python", ""] * (len(found) // 2)
    return [(found[i][1], found[i + 1][1]) for i in range(0, len(found), 2)]


@pytest.mark.parametrize("number, fault", [(0, "widths_wrong"), (1, "gradients_lost"), (2, "eval_in_bf16"),
                                           (3, "gradients_lost")])
def test_the_report_shows_what_it_says(number, fault):
    skip_without(fault)
    program, printed = blocks()[number]
    assert len(program.splitlines()) <= 15 and len(blocks()) == 4
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed


def test_the_report_names_the_versions_it_was_seen_with():
    text = REPORT.read_text()
    assert "bitsandbytes 0.50.2" in text and "torch 2.13.0" in text
