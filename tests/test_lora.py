"""LoRA: the functions and the layer, against peft's, in every dtype, and with wrong arguments."""
from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pefttools.lora import LoRAConfig, LoRALinear, lora_delta, lora_forward, lora_init, lora_scale

CLOSE = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices this small are slower on several threads, and far slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def peft_linear(base, r, alpha, dropout=0.0, rslora=False):
    """peft's layer around the same base, as `get_peft_model` makes it: adapters in float32 beside 16-bit weights."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import cast_adapter_dtype

    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, use_rslora=rslora)
    layer = Linear(base, "default", config=config, r=r, lora_alpha=alpha)
    cast_adapter_dtype(layer, "default")
    base.requires_grad_(False)
    return layer


def pair(d_in=48, d_out=32, r=4, alpha=12, dtype=torch.float32, bias=True, seed=0, **options):
    """(ours, peft's) around equal bases, with the same A and the same non-zero B."""
    torch.manual_seed(seed)
    base = nn.Linear(d_in, d_out, bias=bias).to(dtype)
    theirs = peft_linear(copy.deepcopy(base), r, alpha, **options)
    ours = LoRALinear(base, r, alpha, **options)
    with torch.no_grad():
        ours.lora_B["default"].weight.normal_(std=0.1)
        theirs.lora_A["default"].weight.copy_(ours.lora_A["default"].weight)
        theirs.lora_B["default"].weight.copy_(ours.lora_B["default"].weight)
    return ours, theirs


def everything(layer, x, seed=None):
    """Output, and the gradients of x, A and B under a fixed non-trivial loss."""
    x = x.clone().requires_grad_(True)
    if seed is not None:
        torch.manual_seed(seed)
    y = layer(x)
    weights = torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype)
    (y * weights).sum().backward()
    return {"y": y.detach(), "dx": x.grad, "dA": layer.lora_A["default"].weight.grad,
            "dB": layer.lora_B["default"].weight.grad}


# ------------------------------------------------------------------------------------------------ against peft

@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_layer_equals_peft_forward_and_gradients(dtype, bias, rslora):
    ours, theirs = pair(dtype=dtype, bias=bias, rslora=rslora)
    x = torch.randn(2, 5, 48, dtype=dtype)
    got, expected = everything(ours, x), everything(theirs, x)
    for name in expected:
        assert got[name].dtype == expected[name].dtype, name
        torch.testing.assert_close(got[name], expected[name], **CLOSE, msg=lambda m, name=name: f"{name}: {m}")
    assert got["y"].dtype == dtype
    assert got["dA"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ours.base_layer.weight.grad is None


def test_same_arithmetic_as_peft_so_the_outputs_are_bit_identical():
    ours, theirs = pair(alpha=7)
    x = torch.randn(9, 48)
    assert torch.equal(ours(x), theirs(x))


def test_dropout_is_on_the_adapter_path_only_and_equals_pefts():
    ours, theirs = pair(dropout=0.5, dtype=torch.bfloat16)
    x = torch.randn(4, 48, dtype=torch.bfloat16)
    got, expected = everything(ours, x, seed=3), everything(theirs, x, seed=3)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], **CLOSE)
    with torch.no_grad():
        ours.lora_B["default"].weight.zero_()
    assert torch.equal(ours.train()(x), ours.base_layer(x))


def test_no_dropout_in_evaluation_and_none_in_a_layer_put_into_a_model_that_evaluates():
    ours, theirs = pair(dropout=0.5)
    x = torch.randn(4, 48)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    assert torch.equal(ours(x), ours(x))
    assert not LoRALinear(nn.Linear(8, 8).eval(), 2, 4, dropout=0.5).lora_dropout["default"].training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merged_weight_is_bit_identical_to_pefts(dtype):
    ours, theirs = pair(dtype=dtype)
    ours.merge()
    theirs.merge()
    assert torch.equal(ours.base_layer.weight, theirs.get_base_layer().weight)


def test_state_dict_keys_and_shapes_are_pefts():
    ours, theirs = pair(dropout=0.1)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert set(ours.adapter_parameters()) == {"lora_A.default.weight", "lora_B.default.weight"}


# ------------------------------------------------------------------------------------------------ the functions

@settings(max_examples=40, deadline=None)
@given(data=st.data(), d_in=st.integers(1, 24), d_out=st.integers(1, 24), alpha=st.floats(-32, 32),
       batch=st.lists(st.integers(0, 3), max_size=3), bias=st.booleans(), rslora=st.booleans())
def test_forward_is_the_formula_for_any_shape(data, d_in, d_out, alpha, batch, bias, rslora):
    r = data.draw(st.integers(1, min(d_in, d_out)))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    x, W, A, B, b = (torch.randn(*shape, generator=g, dtype=torch.float64)
                     for shape in ((*batch, d_in), (d_out, d_in), (r, d_in), (d_out, r), (d_out,)))
    b = b if bias else None
    scale = alpha / (r ** 0.5 if rslora else r)
    expected = x @ (W + scale * B @ A).T + (b if bias else 0)
    got = lora_forward(x, W, A, B, alpha, b, rslora)
    assert got.shape == (*batch, d_out)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(lora_delta(A, B, alpha, rslora), scale * B @ A)
    assert torch.linalg.matrix_rank(lora_delta(A, B, 1.0)) <= r


def test_forward_function_and_layer_agree():
    ours, _ = pair(alpha=5, rslora=True)
    x = torch.randn(3, 48)
    A, B = (p.detach() for p in ours.adapter_parameters().values())
    base = ours.base_layer
    assert torch.equal(lora_forward(x, base.weight, A, B, 5, base.bias, rslora=True), ours(x))


@pytest.mark.parametrize("rslora", [False, True])
def test_gradcheck_in_float64(rslora):
    g = torch.Generator().manual_seed(0)
    x, W, A, B, b = (torch.randn(*s, generator=g, dtype=torch.float64, requires_grad=True)
                     for s in ((2, 3, 5), (4, 5), (2, 5), (4, 2), (4,)))
    assert torch.autograd.gradcheck(lambda *t: lora_forward(*t[:4], 3.0, t[4], rslora), (x, W, A, B, b))
    layer = LoRALinear(nn.Linear(5, 4).double(), 2, 3.0, rslora=rslora)
    parameters = list(layer.adapter_parameters())

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values)), x)

    assert torch.autograd.gradcheck(run, (x, A, B))


def test_init_is_pefts_distribution_and_needs_no_global_randomness():
    before = torch.get_rng_state()
    A, B = lora_init(400, 300, 8, torch.Generator().manual_seed(1))
    again, _ = lora_init(400, 300, 8, torch.Generator().manual_seed(1))
    assert torch.equal(before, torch.get_rng_state())
    assert A.shape == (8, 400) and B.shape == (300, 8) and A.dtype == torch.float32
    assert torch.equal(A, again) and not torch.equal(A, lora_init(400, 300, 8, torch.Generator().manual_seed(2))[0])
    assert not B.any()
    bound = 1 / math.sqrt(400)  # Kaiming-uniform with a = √5
    assert 0.99 * bound < A.abs().max() <= bound
    torch.manual_seed(5)
    expected = nn.init.kaiming_uniform_(torch.empty(8, 400), a=math.sqrt(5))
    torch.manual_seed(5)
    assert torch.equal(lora_init(400, 300, 8)[0], expected)


def test_scale():
    assert lora_scale(8, 16) == 2 and lora_scale(16, 8) == 0.5
    assert lora_scale(16, 8, rslora=True) == 2


def test_the_numbers_in_the_module_docstring():
    config = LoRAConfig(r=8)
    sizes = [math.prod(shape) for shape in config.shapes(nn.Linear(2048, 2048, device="meta")).values()]
    assert sum(sizes) == 32_768 and 2048 * 2048 == 4_194_304 and round(100 * 32_768 / 4_194_304, 2) == 0.78
    gpt3 = LoRAConfig(r=4).shapes(nn.Linear(12_288, 12_288, device="meta"))
    assert 2 * 96 * sum(math.prod(shape) for shape in gpt3.values()) == 18_874_368


# ------------------------------------------------------------------------------------------------ the layer

def test_identity_at_the_start_and_the_first_gradient_goes_to_b_alone():
    base = nn.Linear(12, 20)
    layer = LoRALinear(base, 3, 6)
    x = torch.randn(7, 12)
    assert torch.equal(layer(x), base(x))
    got = everything(layer, x)
    assert not got["dA"].any() and got["dB"].any()


def test_only_a_and_b_are_trainable_and_the_global_generator_is_spared():
    base = nn.Linear(12, 20)
    before = torch.get_rng_state()
    layer = LoRALinear(base, 3, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == set(layer.adapter_parameters())
    assert layer.base_layer is base and sum(p.numel() for p in layer.adapter_parameters().values()) == 3 * (12 + 20)


def test_agreeing_dtypes_make_no_copy_of_x():
    layer = LoRALinear(nn.Linear(12, 20), 3, 6)
    saved = []
    x = torch.randn(7, 12, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    inputs = [t for t in saved if t.shape == x.shape]
    assert inputs and all(t.data_ptr() == x.data_ptr() for t in inputs)


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)])
def test_merged_equals_unmerged_within_the_rounding_of_the_weight(dtype, error):
    ours, _ = pair(dtype=dtype, d_in=64, d_out=64, r=8)
    x = torch.randn(16, 64, dtype=dtype)
    unmerged = ours(x)
    ours.merge()
    assert ours.merged and not torch.equal(ours(x), F.linear(x, ours._original, ours.base_layer.bias))
    assert (ours(x) - unmerged).abs().max() <= error * unmerged.abs().max()
    # merged, it costs what a plain linear layer costs: no gradient path through A and B is left
    assert not ours(x).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merge_and_unmerge_are_idempotent_and_unmerge_is_exact_where_subtracting_is_not(dtype):
    ours, theirs = pair(dtype=dtype, d_in=128, d_out=128)
    weight, original = ours.base_layer.weight, ours.base_layer.weight.detach().clone()
    keys = list(ours.state_dict())
    ours.unmerge()
    assert torch.equal(weight, original)
    ours.merge()
    merged = weight.detach().clone()
    ours.merge()
    assert torch.equal(weight, merged) and not torch.equal(merged, original)
    assert list(ours.state_dict()) == keys  # the copy kept for unmerging is not saved
    ours.unmerge()
    ours.unmerge()
    assert torch.equal(weight, original) and ours.base_layer.weight is weight and not ours.merged

    theirs.merge()
    theirs.unmerge()
    left = (theirs.get_base_layer().weight - original).abs().max() / original.abs().max()
    assert 0 < left < {torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]


def test_merge_and_unmerge_errors_stated_in_the_docstrings():
    stated = {torch.float32: (6e-7, 8e-8), torch.float16: (9e-4, 7e-4), torch.bfloat16: (7e-3, 6e-3)}
    for dtype, (forward, subtract) in stated.items():
        torch.manual_seed(0)
        layer = LoRALinear(nn.Linear(512, 512).to(dtype), 16, 32)
        with torch.no_grad():
            layer.lora_B["default"].weight.normal_(std=0.02)
        original, x = layer.base_layer.weight.detach().clone(), torch.randn(64, 512).to(dtype)
        assert 0.15 < layer.delta().norm() / original.float().norm() < 0.17
        before = layer(x)
        layer.merge()
        assert forward / 3 < (layer(x) - before).abs().max() / before.abs().max() < 2 * forward
        back = layer.base_layer.weight - layer.delta().to(dtype)
        assert subtract / 3 < (back - original).abs().max() / original.abs().max() < 2 * subtract


def test_a_merged_layer_moves_with_its_original():
    ours, _ = pair()
    original = ours.base_layer.weight.detach().clone()
    ours.merge()
    ours = copy.deepcopy(ours).double()
    ours.unmerge()
    assert torch.equal(ours.base_layer.weight, original.double())


def test_merge_refuses_a_diverged_adapter_and_a_quantized_weight_and_changes_nothing():
    ours, _ = pair()
    original = ours.base_layer.weight.detach().clone()
    with torch.no_grad():
        ours.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite entries in torch.float32.*Nothing was changed"):
        ours.merge()
    assert torch.equal(ours.base_layer.weight, original) and not ours.merged

    large, _ = pair(dtype=torch.float16)
    with torch.no_grad():
        large.lora_B["default"].weight.fill_(1e6)
    with pytest.raises(ValueError, match="too large for this dtype"):
        large.merge()

    ours.base_layer.weight = nn.Parameter(torch.zeros(32, 48, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match=r"torch\.uint8 \(quantized\).*dequantize the layer first"):
        ours.merge()


# ------------------------------------------------------------------------------------------------ wrong arguments

@pytest.mark.parametrize("change, message", [
    ({"x": (2, 6)}, r"x must be \[\.\.\., d_in=5\].*got \[2, 6\]"),
    ({"x": ()}, r"x must be \[\.\.\., d_in=5\]"),
    ({"weight": (5,)}, r"weight must be \[d_out, d_in\]; got shape \[5\]"),
    ({"A": (5, 2)}, r"A must be \[r, d_in=5\]; got shape \[5, 2\]"),
    ({"A": (5,)}, r"A must be \[r, d_in=5\]"),
    ({"B": (2, 4)}, r"B must be \[d_out=4, r\]; got shape \[2, 4\]"),
    ({"B": (4, 3)}, r"must share r: A has 2 rows, B has 3 columns"),
    ({"bias": (5,)}, r"bias must be \[d_out=4\]; got shape \[5\]"),
    ({"A": (0, 5), "B": (4, 0)}, "r must be a whole number, 1 or more"),
])
def test_forward_names_the_tensor_of_the_wrong_shape(change, message):
    shapes = {"x": (2, 5), "weight": (4, 5), "A": (2, 5), "B": (4, 2), "bias": (4,)} | change
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        lora_forward(tensors["x"], tensors["weight"], tensors["A"], tensors["B"], 4, tensors["bias"])


def test_delta_names_wrong_factors():
    with pytest.raises(ValueError, match="must share r"):
        lora_delta(torch.zeros(2, 5), torch.zeros(4, 3), 1)
    with pytest.raises(ValueError, match=r"A must be \[r, d_in\] and B \[d_out, r\]"):
        lora_delta(torch.zeros(5), torch.zeros(4, 3), 1)


@pytest.mark.parametrize("make", [
    lambda **kw: LoRALinear(nn.Linear(6, 4), **({"r": 2, "alpha": 4} | kw)), lambda **kw: LoRAConfig(**kw)])
@pytest.mark.parametrize("settings, message", [
    ({"r": 0}, r"r must be a whole number, 1 or more.*got 0"),
    ({"r": -3}, "r must be a whole number.*got -3"),
    ({"r": 2.5}, "r must be a whole number.*got 2.5"),
    ({"r": True}, "r must be a whole number.*got True"),
    ({"alpha": float("nan")}, "alpha must be a finite number.*got nan"),
    ({"alpha": float("inf")}, "alpha must be a finite number.*got inf"),
    ({"alpha": 0}, "alpha must be a finite number other than 0.*got 0"),
    ({"alpha": "16"}, "alpha must be a finite number.*got '16'"),
    ({"dropout": 1.0}, r"dropout must be a probability in \[0, 1\); got 1.0"),
    ({"dropout": -0.1}, r"dropout must be a probability in \[0, 1\); got -0.1"),
    ({"dropout": float("nan")}, "dropout must be a probability"),
])
def test_settings_that_make_no_sense(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_a_rank_above_the_smaller_dimension_is_refused_with_the_reason():
    message = r"r = 5 is more than min\(d_in=6, d_out=4\) = 4.*nothing that B·A could not express already.*Use r ≤ 4"
    base = nn.Linear(6, 4)
    with pytest.raises(ValueError, match=message):
        LoRALinear(base, 5, 4)
    with pytest.raises(ValueError, match=message):
        LoRAConfig(r=5).shapes(base)
    assert LoRALinear(base, 4, 4).r == 4


def test_only_a_linear_layer_is_wrapped():
    with pytest.raises(TypeError, match="base must be an nn.Linear; got Embedding"):
        LoRALinear(nn.Embedding(4, 4), 2, 4)
