"""DoRA: the norm, the function with its own gradient, the layer and its files, against peft's and against autograd."""
from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pefttools.checkpoint import load_adapter, save_adapter
from pefttools.dora import DoRAConfig, DoRALinear, dora_forward, dora_norm
from pefttools.dora_product import _DoRA
from pefttools.inject import (adapter_layers, adapter_parameters, attach, count_parameters, detach, disabled, merge,
                              trainable)

pytestmark = pytest.mark.usefixtures("one_thread")
PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")


def peft_layer(base, r, alpha, dropout=0.0, rslora=False):
    """peft's layer around `base`, as `get_peft_model` makes it: adapters in float32 beside 16-bit weights."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import cast_adapter_dtype

    conv1d = type(base).__name__ == "Conv1D"
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, use_rslora=rslora, use_dora=True,
                        fan_in_fan_out=conv1d)
    layer = Linear(base, "default", config=config, r=r, lora_alpha=alpha, is_target_conv_1d_layer=conv1d)
    cast_adapter_dtype(layer, "default")
    layer.requires_grad_(True)
    base.requires_grad_(False)
    return layer


def weights_of(layer):
    return [getattr(layer, part)["default"].weight for part in PARTS]


def random_values(layer, seed=0):
    """Away from the start: B is not zero, and m is not the norm."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter, low, high in zip(weights_of(layer), (-0.3, -0.3, 0.2), (0.3, 0.3, 2.0)):
            parameter.copy_(torch.rand(parameter.shape, generator=generator) * (high - low) + low)
    return layer


def copied(theirs):
    return [p.detach().clone().requires_grad_() for p in weights_of(theirs)]


def with_gradients(function, x, parameters, seed=5):
    """{y, dx, dA, dB, dm} under a random gradient of y."""
    x = x.detach().clone().requires_grad_()
    y = function(x)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype)
    grads = torch.autograd.grad(y, [x, *parameters], g)
    return dict(zip(("y", "dx", "dA", "dB", "dm"), (y.detach(), *grads)))


def sizes(x, W, A, B, m, bias, scaling, seed=5):
    """How large each result would be if nothing cancelled: what rounding errors are relative to."""
    x, W, A, B, m = (t.detach().double() for t in (x.flatten(0, -2), W, A, B, m))
    bias = 0 if bias is None else bias.detach().double().abs()
    norm = dora_norm(W, A, B, scaling)
    x, W, A, B, m = (t.abs() for t in (x, W, A, B, m))
    norm = norm ** 2 / dora_norm(W, A, B, scaling)        # where W and ΔW cancel, the norm itself is less exact
    g = torch.randn(len(x), len(W), generator=torch.Generator().manual_seed(seed)).double().abs()
    v, gc = x @ (W + scaling * B @ A).T, g * m / norm
    v_peft = v + 2 * bias         # peft adds b to W₀x and subtracts it again, which rounds v as if b were in it
    return {"y": m / norm * v_peft + bias, "dx": gc @ (W + scaling * B @ A), "dA": scaling * (B.T @ gc.T) @ x,
            "dB": scaling * gc.T @ (x @ A.T), "dm": (g * v_peft).sum(0) / norm}


def assert_near(got, expected, largest=1e-6, scales=None):
    """The largest difference, relative to the largest entry, of each."""
    for name in expected:
        assert got[name].dtype == expected[name].dtype and got[name].shape == expected[name].shape, name
        scale = (scales or expected)[name].double().abs().max().clamp_min(1e-30)
        error = ((got[name].double() - expected[name].double()).abs().max() / scale).item()
        assert error <= largest, f"{name}: {error:.1e} > {largest:.1e}"


# ------------------------------------------------------------------------------------------------ the norm

@given(d_out=st.integers(1, 70), d_in=st.integers(1, 70), r=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_norm_equals_pefts_for_any_shape(d_out, d_in, r, seed):
    from peft.tuners.lora.dora import DoraLinearLayer

    generator = torch.Generator().manual_seed(seed)
    W, A, B = (torch.randn(*shape, generator=generator) for shape in ((d_out, d_in), (r, d_in), (d_out, r)))
    expected = DoraLinearLayer(False).get_weight_norm(W, B @ A, 0.7)
    torch.testing.assert_close(dora_norm(W, A, B, 0.7), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("d_out, d_in", [(5, 2 ** 19), (3, 2 ** 19 + 1), (700, 1024)])
def test_norm_of_rows_that_need_several_pieces(d_out, d_in):
    W, A, B = torch.randn(d_out, d_in), torch.randn(2, d_in), torch.randn(d_out, 2)
    expected = torch.linalg.norm(W + 2 * B @ A, dim=1)
    torch.testing.assert_close(dora_norm(W, A, B, 2.0), expected, rtol=1e-6, atol=0)


def test_norm_is_right_where_the_update_nearly_cancels_the_weight():
    # ‖W‖² + 2s·B(AWᵀ) + s²·B(AAᵀ)Bᵀ, the formula that never forms W + ΔW, has no right digit left here
    A, B = torch.randn(4, 300), torch.randn(50, 4)
    W = (-(B.double() @ A.double()) + 1e-3 * torch.randn(50, 300)).float()
    expected = (W.double() + B.double() @ A.double()).norm(dim=1)
    torch.testing.assert_close(dora_norm(W, A, B, 1.0).double(), expected, rtol=2e-4, atol=0)
    by_formula = W.square().sum(1) + 2 * (B * (W @ A.T)).sum(1) + ((B @ (A @ A.T)) * B).sum(1)
    assert (by_formula.double() / expected.square() - 1).abs().max() > 0.05


def test_norm_goes_along_rows_one_number_for_each_output_as_the_worked_number_says():
    norm = dora_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0]]), 1.0)
    assert norm.tolist() == [10.0]
    y = dora_forward(torch.eye(2), torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0]]),
                     torch.tensor([5.0]), alpha=1)
    assert y.flatten().tolist() == [3.0, 4.0]


def test_norm_in_16_bits_is_computed_in_32():
    W, A, B = torch.randn(40, 64).bfloat16(), torch.randn(4, 64), torch.randn(40, 4)
    expected = (W.double() + B.double() @ A.double()).norm(dim=1).float()
    assert dora_norm(W, A, B, 1.0).dtype == torch.float32
    torch.testing.assert_close(dora_norm(W, A, B, 1.0), expected, rtol=1e-6, atol=0)
    big = torch.full((2, 64), 3e4, dtype=torch.float16)         # 2.4e5 is more than float16 can say
    assert dora_norm(big, A.half(), B[:2].half(), 1.0).isfinite().all()


# ------------------------------------------------------------------------------------------------ the function

@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@given(shape=st.sampled_from([(), (1,), (7,), (2, 5), (0,), (3, 0), (2, 3, 4)]), d_in=st.integers(1, 40),
       d_out=st.integers(1, 40), r=st.integers(1, 6), alpha=st.sampled_from([1, 8, 5.5]), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_forward_and_gradients_equal_pefts_in_float32(bias, keep, shape, d_in, d_out, r, alpha, seed):
    torch.manual_seed(seed)
    base = nn.Linear(d_in, d_out, bias=bias)
    theirs = random_values(peft_layer(base, r, alpha), seed)
    A, B, m = copied(theirs)
    x = torch.randn(*shape, d_in)
    if x.numel() == 0 or x.dim() == 1:
        assert dora_forward(x, base.weight, A, B, m, alpha, base.bias).shape == (*shape, d_out)
        return
    ours = with_gradients(lambda x: _DoRA.apply(x, A, B, m, base.bias, base.weight, alpha / r, False, keep), x,
                          (A, B, m))
    scales = sizes(x, base.weight, A, B, m, base.bias, alpha / r)
    assert_near(ours, with_gradients(theirs, x, weights_of(theirs)), 1e-6, scales)


@pytest.mark.parametrize("d_in, d_out", [(256, 256), (256, 688), (300, 100)])
@pytest.mark.parametrize("keep", [False, True])
def test_forward_and_gradients_at_real_widths_are_as_near_to_the_truth_as_pefts(d_in, d_out, keep):
    torch.manual_seed(0)
    base = nn.Linear(d_in, d_out)
    theirs = random_values(peft_layer(base, 8, 16))
    A, B, m = copied(theirs)
    x = torch.randn(64, d_in)
    ours = with_gradients(lambda x: _DoRA.apply(x, A, B, m, base.bias, base.weight, 2.0, False, keep), x, (A, B, m))
    assert_near(ours, with_gradients(theirs, x, weights_of(theirs)), 1e-6)
    exact = [p.detach().double().requires_grad_() for p in (A, B, m)]
    truth = with_gradients(lambda x: dora_forward(x, base.weight.detach().double(), *exact, 16, base.bias.double()),
                           x.double(), exact)
    assert_near(ours, {name: value.float() for name, value in truth.items()}, 1e-6)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype, largest", [(torch.bfloat16, 2 ** -7), (torch.float16, 2 ** -10)])
def test_16_bits_equal_pefts_up_to_its_rounding_and_are_no_farther_from_the_truth(dtype, largest, keep):
    torch.manual_seed(0)
    base = nn.Linear(256, 192).to(dtype)
    theirs = random_values(peft_layer(base, 8, 16))
    A, B, m = copied(theirs)
    x = torch.randn(64, 256).to(dtype)
    got = with_gradients(lambda x: _DoRA.apply(x, A, B, m, base.bias, base.weight, 2.0, False, keep), x, (A, B, m))
    expected = with_gradients(theirs, x, weights_of(theirs))
    assert {name: value.dtype for name, value in got.items()} == {"y": dtype, "dx": dtype} | dict.fromkeys(
        ("dA", "dB", "dm"), torch.float32)
    for names, allowed in ((("dA", "dB"), 1e-6), (("dm",), largest / 8), (("y", "dx"), largest)):
        assert_near(got, {name: expected[name] for name in names}, allowed)
    exact = [p.detach().double().requires_grad_() for p in (A, B, m)]
    truth = with_gradients(lambda x: dora_forward(x, base.weight.detach().double(), *exact, 16, base.bias.double()),
                           x.double(), exact)
    for name in truth:
        error, of_peft = ((part[name].double() - truth[name]).norm().item() for part in (got, expected))
        assert error <= 1.1 * of_peft, f"{name}: {error:.2e}, peft {of_peft:.2e}"


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck_with_the_norm_held_constant_as_the_paper_does(bias, keep, added):
    torch.manual_seed(0)
    x, W, A, B = (torch.randn(*s).double() for s in ((2, 3, 5), (4, 5), (2, 5), (4, 2)))
    m, b = torch.rand(4).double() + 0.5, torch.randn(4).double() if bias else None
    norm = dora_norm(W, A, B, 0.7)

    def plain(x, A, B, m, *b):
        # against torch.autograd through the formula, and that against differences: see the next test
        return m / norm * F.linear(x, W + 0.7 * B @ A) + (b[0] if b else 0) - (F.linear(x, W) if added else 0)

    def ours(x, A, B, m, *b):
        return _DoRA.apply(x, A, B, m, b[0] if b else None, W, 0.7, added, keep)

    inputs = [t.requires_grad_() for t in (x, A, B, m, b) if t is not None]
    y, expected = ours(*inputs), plain(*inputs)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(y)
    for got, right in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(expected, inputs, g)):
        torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("keep", [False, True])
def test_gradcheck_in_x_m_and_bias_and_in_A_and_B_with_the_norm_pinned(keep, monkeypatch):
    import pefttools.dora_product as module

    torch.manual_seed(0)
    x, W, A, B = (torch.randn(*s).double() for s in ((3, 5), (4, 5), (2, 5), (4, 2)))
    m, b = torch.rand(4).double() + 0.5, torch.randn(4).double()
    pinned = dora_norm(W, A, B, 0.7)
    monkeypatch.setattr(module, "dora_norm", lambda *_: pinned)     # gradcheck moves A and B; the norm must not follow
    inputs = [t.requires_grad_() for t in (x, A, B, m, b)]
    assert torch.autograd.gradcheck(lambda *a: _DoRA.apply(*a, W, 0.7, False, keep), inputs)


@pytest.mark.parametrize("keep", [False, True])
def test_second_derivatives(keep, monkeypatch):
    import pefttools.dora_product as module

    torch.manual_seed(0)
    x, W, A, B = (torch.randn(*s).double() for s in ((3, 4), (3, 4), (2, 4), (3, 2)))
    m = torch.rand(3).double() + 0.5
    pinned = dora_norm(W, A, B, 0.7)
    monkeypatch.setattr(module, "dora_norm", lambda *_: pinned)
    inputs = [t.requires_grad_() for t in (x, A, B, m)]
    assert torch.autograd.gradgradcheck(lambda x, A, B, m: _DoRA.apply(x, A, B, m, None, W, 0.7, False, keep), inputs)


def test_only_what_is_asked_for_gets_a_gradient():
    x, W, A, B, m = (torch.randn(*s) for s in ((3, 5), (4, 5), (2, 5), (4, 2), (4,)))
    for wanted in (x, A, B, m):
        for t in (x, A, B, m):
            t.requires_grad_(t is wanted)
        dora_forward(x, W, A, B, m, 2).sum().backward()
        assert [t.grad is not None for t in (x, A, B, m)] == [t is wanted for t in (x, A, B, m)]
        wanted.grad = None


@pytest.mark.filterwarnings("ignore")
def test_under_functional_transforms_and_compile_it_is_the_plain_formula():
    W, A, B, m = (torch.randn(*s) for s in ((4, 5), (2, 5), (4, 2), (4,)))
    x = torch.randn(6, 3, 5)
    by_row = torch.func.vmap(lambda row: dora_forward(row, W, A, B, m, 2))(x)
    torch.testing.assert_close(by_row, dora_forward(x, W, A, B, m, 2), rtol=1e-5, atol=1e-6)
    gradient = torch.func.grad(lambda m: dora_forward(x, W, A, B, m, 2).sum())(m)
    m.requires_grad_()
    dora_forward(x, W, A, B, m, 2).sum().backward()
    torch.testing.assert_close(gradient, m.grad, rtol=1e-5, atol=1e-5)


def test_a_weight_changed_between_forward_and_backward_is_noticed():
    x, W, A, B, m = (torch.randn(*s) for s in ((3, 5), (4, 5), (2, 5), (4, 2), (4,)))
    y = dora_forward(x.requires_grad_(), W, A, B, m, 2)
    W.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_row_of_zeros_stays_zero_and_finite():
    W = torch.randn(3, 4)
    W[1] = 0
    A, B = torch.randn(2, 4), torch.zeros(3, 2)
    m = dora_norm(W, A, B, 1.0)
    y = dora_forward(torch.randn(5, 4), W, A, B, m, 2)
    assert y.isfinite().all() and (y[:, 1] == 0).all() and (y[:, 0] != 0).all()
    base = nn.Linear(4, 3, bias=False)
    base.weight.data = W
    layer = DoRALinear(base, 2, 2)
    layer.merge()
    torch.testing.assert_close(base.weight, W)


@pytest.mark.parametrize("change, says", [
    ({"weight": torch.zeros(4)}, "weight must be"), ({"A": torch.zeros(2, 6)}, "A must be"),
    ({"A": torch.zeros(2)}, "A must be"),
    ({"B": torch.zeros(2, 4)}, "B must be"), ({"magnitude": torch.ones(5)}, "magnitude must be"),
    ({"magnitude": torch.ones(1, 4)}, "magnitude must be"), ({"bias": torch.ones(3)}, "bias must be"),
    ({"x": torch.zeros(3, 4)}, "x must be"), ({"x": torch.tensor(1.0)}, "x must be")])
def test_wrong_shapes_are_named(change, says):
    right = {"x": torch.zeros(3, 5), "weight": torch.ones(4, 5), "A": torch.zeros(2, 5), "B": torch.zeros(4, 2),
             "magnitude": torch.ones(4), "alpha": 2}
    dora_forward(**right)
    with pytest.raises(ValueError, match=says):
        dora_forward(**right | change)


# ------------------------------------------------------------------------------------------------ the layer

def pair(d_in=48, d_out=32, r=4, alpha=12, dtype=torch.float32, bias=True, base=None, seed=0, **options):
    """(ours, peft's) around equal bases, with the same values, away from the start."""
    torch.manual_seed(seed)
    base = base or nn.Linear(d_in, d_out, bias=bias).to(dtype)
    ours = DoRALinear(copy.deepcopy(base), r, alpha, **options)
    theirs = random_values(peft_layer(copy.deepcopy(base), r, alpha, **options), seed)
    with torch.no_grad():
        for mine, value in zip(weights_of(ours), weights_of(theirs)):
            mine.copy_(value)
    return ours, theirs


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype, largest", [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.float16, 2 ** -9),
                                            (torch.bfloat16, 2 ** -6)])
def test_layer_equals_peft(dtype, largest, bias, rslora):
    ours, theirs = pair(dtype=dtype, bias=bias, rslora=rslora)
    x = torch.randn(2, 5, 48).to(dtype)
    assert_near(with_gradients(ours, x, weights_of(ours)), with_gradients(theirs, x, weights_of(theirs)), largest)
    assert torch.equal(ours.eval()(x), ours(x))


@pytest.mark.parametrize("dtype, largest", [(torch.float32, 1e-6), (torch.bfloat16, 2 ** -6)])
def test_dropout_is_pefts(dtype, largest):
    ours, theirs = pair(dtype=dtype, dropout=0.4)
    x, results = torch.randn(6, 48).to(dtype), []
    for layer in (ours, theirs):
        torch.manual_seed(3)
        results.append(with_gradients(layer, x, weights_of(layer)))
    assert_near(*results, largest)
    assert_near({"y": ours.eval()(x)}, {"y": theirs.eval()(x)}, largest)
    assert torch.equal(ours(x), ours(x))
    assert not DoRALinear(nn.Linear(8, 8).eval(), 2, 4, dropout=0.5).lora_dropout["default"].training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merged_weight_is_bit_identical_to_pefts_and_unmerge_is_exact(dtype):
    ours, theirs = pair(dtype=dtype)
    before, x = ours.base_layer.weight.clone(), torch.randn(5, 48).to(dtype)
    apart = ours(x)
    ours.merge()
    ours.merge()
    theirs.merge()
    assert torch.equal(ours.base_layer.weight, theirs.get_base_layer().weight)
    # the merged weight is rounded once: half a step of its dtype for each of 48 terms
    torch.testing.assert_close(ours(x).double(), apart.double(), rtol=0, atol=48 * torch.finfo(dtype).eps * 2)
    ours.unmerge()
    ours.unmerge()
    assert torch.equal(ours.base_layer.weight, before) and torch.equal(ours(x), apart)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_as_the_layer_it_wraps(dtype):
    base = nn.Linear(48, 32, bias=False).to(dtype)
    x = torch.randn(7, 48).to(dtype)
    ours = DoRALinear(copy.deepcopy(base), 4, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(x), base(x))                 # m / norm is 1 exactly; peft rounds m to the weight's dtype
    assert ours.lora_magnitude_vector["default"].weight.dtype == torch.float32
    assert weights_of(ours)[2].shape == (32,)


def test_state_dict_keys_and_shapes_are_pefts():
    ours, theirs = pair(dropout=0.1)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.filterwarnings("ignore")
def test_conv1d_equals_peft_merged_and_not():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    ours, theirs = pair(base=Conv1D(40, 24), alpha=6)                            # [d_in=24, d_out=40]
    x = torch.randn(2, 5, 24)
    assert_near(with_gradients(ours, x, weights_of(ours)), with_gradients(theirs, x, weights_of(theirs)))
    ours.merge()
    theirs.merge()
    assert torch.equal(ours.base_layer.weight, theirs.get_base_layer().weight)
    assert ours.base_layer.weight.is_contiguous()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype, largest", [(torch.float32, 2e-6), (torch.bfloat16, 2 ** -6)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_on_nf4_it_equals_peft_on_bitsandbytes(dtype, largest, dropout):
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig
    from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
    from peft.tuners.tuners_utils import cast_adapter_dtype

    from pefttools.qlora import NF4Linear

    torch.manual_seed(0)
    dense = nn.Linear(128, 64).to(dtype)
    quantized = Linear4bit(128, 64, compute_dtype=dtype, quant_type="nf4", compress_statistics=False)
    quantized.load_state_dict(dense.state_dict())
    quantized = quantized.to("cpu")
    quantized.support_avx512bf16_for_cpu = False                                 # see pefttools.bnb
    theirs = PeftLinear4bit(quantized, "default", r=4, lora_alpha=8,
                            config=LoraConfig(r=4, lora_alpha=8, use_dora=True, lora_dropout=dropout))
    cast_adapter_dtype(theirs, "default")
    random_values(theirs)
    x, results = torch.randn(6, 128).to(dtype), []
    expected = None
    for base in (NF4Linear(dense, double_quant=False), quantized):
        ours = DoRALinear(base, 4, 8, dropout=dropout)
        with torch.no_grad():
            for mine, value in zip(weights_of(ours), weights_of(theirs)):
                mine.copy_(value)
        torch.manual_seed(3)
        results.append(with_gradients(ours, x, weights_of(ours)))
        with pytest.raises(TypeError, match="quantized"):
            ours.merge()
    for parameter in weights_of(theirs):
        parameter.requires_grad_(True)
    torch.manual_seed(3)
    expected = with_gradients(theirs, x, weights_of(theirs))
    for result in results:
        assert_near(result, expected, largest)


def test_nothing_of_the_weights_size_waits_for_backward_on_nf4():
    from pefttools.qlora import NF4Linear

    layer = DoRALinear(NF4Linear(nn.Linear(1024, 1024)).bfloat16(), 4, 8)
    x = torch.randn(3, 1024).bfloat16().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert max(t.numel() for t in kept) < 1024 * 16


def test_what_is_kept_for_backward():
    def sizes_of_kept(dtype, d):
        layer, kept = DoRALinear(nn.Linear(d, d, bias=False).to(dtype), 2, 4), []
        layer.requires_grad_(True)
        layer.base_layer.requires_grad_(False)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            layer(torch.randn(3, d).to(dtype).requires_grad_())
        return sorted(list(t.shape) for t in kept if t.shape[0] == 3)

    assert sizes_of_kept(torch.bfloat16, 1024) == [[3, 1024]]                    # x, and nothing else that has tokens
    assert sizes_of_kept(torch.float32, 1024) == [[3, 1024]] * 2                 # and W₀x, for time
    assert sizes_of_kept(torch.bfloat16, 512) == [[3, 512]] * 2


def test_two_adapters_one_acts():
    ours, _ = pair()
    x, first = torch.randn(5, 48), None
    first = ours(x)
    ours.add("second", DoRAConfig(r=2, alpha=2), torch.Generator().manual_seed(1))
    assert ours.names == ["default", "second"] and torch.equal(ours(x), first)
    with torch.no_grad():
        ours.lora_magnitude_vector["second"].weight.mul_(2)
    ours.active = {"second": 1.0}
    expected = 2 * F.linear(x, ours.base_layer.weight) + ours.base_layer.bias
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="choose one"):
        ours.check_active({"default": 1.0, "second": 1.0}, False)
    ours.remove("second")
    ours.active = {"default": 1.0}
    assert ours.names == ["default"] and torch.equal(ours(x), first)


def test_a_weight_of_the_adapter_scales_the_update_as_pefts_scale_layer():
    ours, theirs = pair()
    x = torch.randn(5, 48)
    ours.active = {"default": 0.5}
    theirs.scale_layer(0.5)
    assert_near({"y": ours(x)}, {"y": theirs(x)})


@pytest.mark.parametrize("shape", [(48,), (0, 48), (2, 0, 48), (2, 3, 4, 48)])
def test_shapes_of_input_and_strides(shape):
    ours, theirs = pair()
    x = torch.randn(shape)
    y = ours(x)
    assert y.shape == (*shape[:-1], 32)
    if x.dim() > 1 and x.numel():
        assert_near({"y": y}, {"y": theirs(x)})
    wide = torch.randn(6, 96)[:, ::2]
    assert_near({"y": ours(wide)}, {"y": theirs(wide)})
    y = ours(x.requires_grad_())
    y.sum().backward()
    assert x.grad.shape == x.shape and y.sum().expand(3).sum().requires_grad


def test_a_gradient_that_is_one_number_stretched_over_the_output():
    ours, theirs = pair()
    x = torch.randn(6, 48)
    ours(x).sum().backward()                             # sum's gradient has strides 0
    theirs(x).sum().backward()
    for mine, expected in zip(weights_of(ours), weights_of(theirs)):
        torch.testing.assert_close(mine.grad, expected.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant):
    from torch.utils.checkpoint import checkpoint

    ours, _ = pair()
    x = torch.randn(6, 48)
    plain = with_gradients(ours, x, weights_of(ours))
    if reentrant:                                        # it gives parameters their .grad, but not to autograd.grad
        ours.zero_grad()
        y = checkpoint(ours, x.requires_grad_(), use_reentrant=True)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(5)))
        again = dict(zip(plain, (y.detach(), x.grad, *(p.grad for p in weights_of(ours)))))
    else:
        again = with_gradients(lambda x: checkpoint(ours, x, use_reentrant=False), x, weights_of(ours))
    for name in plain:
        assert torch.equal(plain[name], again[name]), name


def test_autocast_equals_pefts_up_to_its_rounding():
    ours, theirs = pair(d_in=64, d_out=64)
    x = torch.randn(6, 64)
    results = []
    for layer in (ours, theirs):
        x_ = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x_)
            if layer is ours:                            # backward inside of it is no good habit, and common
                y.float().square().sum().backward()
        if layer is theirs:
            y.float().square().sum().backward()
        results.append({"y": y.detach(), "dx": x_.grad, **{str(i): p.grad for i, p in enumerate(weights_of(layer))}})
    assert results[0]["y"].dtype == torch.bfloat16
    assert_near(*results, 2 ** -5)


def test_backward_inside_of_autocast_is_that_outside():
    ours, _ = pair(d_in=64, d_out=64)
    x, gradients = torch.randn(6, 64), []
    for inside in (True, False):
        ours.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = ours(x)
            g = torch.ones_like(y)
            if inside:
                y.backward(g)
        if not inside:
            y.backward(g)
        gradients.append([p.grad.clone() for p in weights_of(ours)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("init", [False, "loftq", "pissa"])
def test_m_starts_at_the_norm_with_the_update_where_that_is_not_zero(init):
    layer = DoRALinear(nn.Linear(64, 64), 4, 8, init=init, generator=torch.Generator().manual_seed(0))
    W, x = layer.base_layer.weight + layer.delta(), torch.randn(5, 64)
    torch.testing.assert_close(weights_of(layer)[2], W.norm(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(layer(x), F.linear(x, W, layer.base_layer.bias), rtol=1e-5, atol=1e-5)


def test_a_copy_is_independent_and_inference_mode_works():
    ours, _ = pair()
    x = torch.randn(3, 48)
    other = copy.deepcopy(ours)
    with torch.no_grad():
        other.lora_magnitude_vector["default"].weight.zero_()
    with torch.inference_mode():
        assert not torch.equal(ours(x), other(x))
        torch.testing.assert_close(other(x), other.base_layer.bias.expand(3, 32))


def test_a_base_that_somebody_unfroze_gets_pefts_gradient():
    ours, theirs = pair()
    x = torch.randn(6, 48)
    for layer in (ours, theirs):
        layer.requires_grad_(True)
        layer(x).square().sum().backward()
    for mine, expected in zip([ours.base_layer.weight, ours.base_layer.bias, *weights_of(ours)],
                              [theirs.base_layer.weight, theirs.base_layer.bias, *weights_of(theirs)]):
        torch.testing.assert_close(mine.grad, expected.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook",
                                      "register_full_backward_hook"])
def test_hooks_on_the_base_layer_are_called_and_change_nothing(register):
    ours, _ = pair()
    x, calls = torch.randn(6, 48), []
    plain = with_gradients(ours, x, weights_of(ours))
    handle = getattr(ours.base_layer, register)(lambda *args: calls.append(1))
    assert_near(with_gradients(ours, x, weights_of(ours)), plain)
    assert calls
    handle.remove()
    assert torch.equal(ours(x), plain["y"])


def test_shapes_can_be_followed_without_memory():
    layer = DoRALinear(nn.Linear(48, 32, device="meta"), 4, 8)
    x = torch.randn(5, 48, device="meta", requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (5, 32) and x.grad.device.type == "meta"


# ------------------------------------------------------------------------------------------------ models and files

def shaken(model, seed=1):
    """Every adapter parameter away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(parameter * (1 + noise) if "magnitude" in name else noise)
    return model


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "qwen2": "all-linear", "gpt2": ["c_attn", "c_fc"],
           "opt": ["q_proj", "fc1"], "bert": ["query", "dense"], "t5": ["q", "wo"]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", list(TARGETS))
def test_files_load_in_peft_and_back_with_equal_logits_and_counts(family, small_model, small_inputs, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    inputs = small_inputs(family)
    base = logits(small_model(family), inputs)
    ours = attach(small_model(family), DoRAConfig(r=4, alpha=8, target_modules=TARGETS[family], rslora=True))
    torch.testing.assert_close(logits(ours, inputs), base, rtol=1e-5, atol=1e-5)
    mine = logits(shaken(ours), inputs)
    assert (mine - base).abs().max() > 1e-2
    save_adapter(ours, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(small_model(family), str(tmp_path / "ours"))
    torch.testing.assert_close(logits(theirs, inputs), mine, rtol=1e-5, atol=1e-5)

    fresh = get_peft_model(small_model(family), LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS[family], use_dora=True, use_rslora=True))
    assert count_parameters(ours) == fresh.get_nb_trainable_parameters()

    theirs.save_pretrained(str(tmp_path / "theirs"))
    back = load_adapter(small_model(family), tmp_path / "theirs")
    assert torch.equal(logits(back, inputs), mine)
    assert all(isinstance(layer, DoRALinear) for _, layer in adapter_layers(back))
    torch.testing.assert_close(logits(merge(back), inputs), mine, rtol=1e-4, atol=1e-4)
    detach(back)
    for (name, a), (_, b) in zip(back.state_dict().items(), small_model(family).state_dict().items()):
        assert torch.equal(a, b), name


@pytest.mark.filterwarnings("ignore")
def test_a_training_run_is_pefts(small_model, small_inputs):
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "down_proj"]
    theirs = get_peft_model(small_model(), LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_dora=True))
    ours = attach(small_model(), DoRAConfig(r=4, alpha=8, target_modules=targets))
    values = {name.removeprefix("base_model.model."): p for name, p in theirs.named_parameters() if p.requires_grad}
    assert set(values) == set(trainable(ours))
    with torch.no_grad():
        for name, parameter in trainable(ours).items():
            parameter.copy_(values[name])
    losses, first = [], ours(**small_inputs()).loss.item()
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=2.0)
        for _ in range(8):
            loss = model(**small_inputs()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert abs(losses[0] - losses[1]) < 1e-5 and losses[0] < first - 0.005
    for name, parameter in trainable(ours).items():
        torch.testing.assert_close(parameter, values[name], rtol=1e-4, atol=1e-5)


def test_generate_and_disabled(small_model, small_inputs):
    model, inputs = small_model(), small_inputs()
    base = logits(model, inputs)
    shaken(attach(model, DoRAConfig(r=4, target_modules="all-linear")))
    assert model.generate(inputs["input_ids"][:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 7)
    changed = logits(model, inputs)
    with disabled(model):
        assert torch.equal(logits(model, inputs), base)
    assert torch.equal(logits(model, inputs), changed) and not torch.equal(changed, base)


def test_gradients_reach_every_adapter_under_gradient_checkpointing(small_model, small_inputs):
    model = attach(small_model().train(), DoRAConfig(r=4, target_modules="all-linear"))
    shaken(model)
    model(**small_inputs()).loss.backward()
    plain = {name: p.grad.clone() for name, p in trainable(model).items()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**small_inputs()).loss.backward()
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-5, atol=1e-7, msg=name)
        assert parameter.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore")
def test_memory_kept_per_token_is_x_once_and_a_third_of_pefts():
    from pefttools.bench.layer_memory import kib_per_token_and_layer, our_dora, peft_lora

    h, k, m = 1024, 256, 4096                            # half of Llama-3.2-1B's width: 98 KiB becomes 49
    shapes = {"hidden_size": h, "intermediate_size": m, "num_attention_heads": 16, "num_key_value_heads": 4,
              "head_dim": 64}
    ours = kib_per_token_and_layer(our_dora, lengths=(8, 16, 24), **shapes)
    # what a frozen layer keeps, and x of the seven layers: 2 bytes of two norms' output and of the MLP's product
    assert ours == pytest.approx((8 * h + 4 * h + 4 * k + 6 * m + 2 * (2 * h + m)) / 1024, abs=0.1)
    theirs = kib_per_token_and_layer(lambda model: peft_lora(model, dora=True), lengths=(8, 16, 24), **shapes)
    assert theirs / ours > 2.9


@pytest.mark.parametrize("wrong, says", [({"r": 0}, "r must be"), ({"r": 33}, "r = 33"), ({"dropout": 1.0}, "dropout"),
                                         ({"alpha": float("nan")}, "alpha")])
def test_bad_settings_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        DoRALinear(nn.Linear(32, 64), **{"r": 4, "alpha": 8} | wrong)


def test_what_is_no_linear_layer_is_refused(small_model):
    with pytest.raises(TypeError, match="linear|Linear"):
        attach(small_model(), DoRAConfig(target_modules=["embed_tokens"]))
