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

from pefttools.lora_config import DEFAULT_TARGETS
from pefttools.lora_update import _pieces, add_update, plain_update
from pefttools.lora import LoRAConfig, LoRALinear, lora_delta, lora_forward, lora_init, lora_scale

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]



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
    alone, = torch.autograd.grad((layer.base_layer(x) * weights).sum(), x)
    return {"y": y.detach(), "dx": x.grad, "dx of the base": alone, "dA": layer.lora_A["default"].weight.grad,
            "dB": layer.lora_B["default"].weight.grad}


# ------------------------------------------------------------------------------------------------ against peft

def assert_same(got, expected):
    """Outputs to the last bit; gradients to 1e-6 of the largest, and in 16 bits dx to a rounding here and there."""
    assert torch.equal(got["y"], expected["y"])
    for name in ("dx", "dA", "dB"):
        mine, theirs = got[name], expected[name]
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape, name
        assert mine.is_contiguous(), name
        if mine.numel() == 0:
            continue
        # sums of numbers of some size: where they cancel, an error of 1e-6 of those remains
        difference, size = (mine.double() - theirs.double()).abs(), theirs.double().abs().max().clamp(min=8)
        if name == "dx" and mine.itemsize == 2:
            # dx is the base's part plus LoRA's, each rounded before the sum: where they cancel, their roundings remain
            parts = theirs.double().abs() + expected["dx of the base"].double().abs()
            assert (difference <= 2 * torch.finfo(mine.dtype).eps * parts + 1e-6 * size).all()
            assert (difference > 0).sum() <= 3 + mine.numel() // 100
        else:
            assert difference.max() <= 1e-6 * size, name


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_layer_equals_peft_forward_and_gradients(dtype, bias, rslora):
    ours, theirs = pair(dtype=dtype, bias=bias, rslora=rslora)
    x = torch.randn(2, 5, 48, dtype=dtype)
    got, expected = everything(ours, x), everything(theirs, x)
    assert_same(got, expected)
    assert got["y"].dtype == dtype
    assert got["dA"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ours.base_layer.weight.grad is None


@settings(max_examples=40, deadline=None)
@given(data=st.data(), d_in=st.integers(1, 70), d_out=st.integers(1, 70), alpha=st.sampled_from([1, 7, 16, -5]),
       batch=st.lists(st.integers(0, 5), min_size=1, max_size=3), bias=st.booleans(), rslora=st.booleans(),
       dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_layer_equals_peft_for_any_shape(data, d_in, d_out, alpha, batch, bias, rslora, dtype):
    r = data.draw(st.integers(1, min(d_in, d_out)))
    ours, theirs = pair(d_in, d_out, r, alpha, dtype, bias, data.draw(st.integers(0, 99)), rslora=rslora)
    x = torch.randn(*batch, d_in, dtype=dtype)
    assert_same(everything(ours, x), everything(theirs, x))


@pytest.mark.parametrize("d_in, d_out, rows, alpha", [(256, 1024, 512, 32), (2048, 512, 300, 32), (1024, 2048, 257, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_shapes_whose_copies_are_taken_in_pieces_equal_pefts(dtype, d_in, d_out, rows, alpha):
    ours, theirs = pair(d_in, d_out, 16, alpha, dtype)
    pieces = _pieces(torch.float32, torch.empty(rows, d_in, dtype=dtype), torch.empty(rows, d_out, dtype=dtype))
    assert (len(pieces) > 1) == (dtype == torch.bfloat16)
    x = torch.randn(rows, d_in, dtype=dtype)
    got, expected = everything(ours, x), everything(theirs, x)
    assert torch.equal(got["y"], expected["y"])
    for name in ("dx", "dA", "dB"):
        difference = (got[name].double() - expected[name].double()).norm() / expected[name].double().norm()
        assert difference <= (1e-6 if name != "dx" or dtype == torch.float32 else 1e-3), name


def test_same_arithmetic_as_peft_so_the_outputs_are_bit_identical():
    ours, theirs = pair(alpha=7)
    x = torch.randn(9, 48)
    assert torch.equal(ours(x), theirs(x))


def test_dropout_is_on_the_adapter_path_only_and_equals_pefts():
    ours, theirs = pair(dropout=0.5, dtype=torch.bfloat16)
    x = torch.randn(4, 48, dtype=torch.bfloat16)
    assert_same(everything(ours, x, seed=3), everything(theirs, x, seed=3))
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_for_backward_are_x_as_it_came_and_r_numbers_a_row(dtype):
    layer = LoRALinear(nn.Linear(12, 20).to(dtype), 3, 6)
    saved = []
    x = torch.randn(7, 12, requires_grad=True, dtype=dtype)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    own = {p.data_ptr() for p in layer.parameters()} | {x.data_ptr()}
    assert x.data_ptr() in {t.data_ptr() for t in saved}
    assert [t.shape for t in saved if t.data_ptr() not in own] == [(7, 3)]


def kept(layers, wrap, tokens=16):
    """Bytes that a forward pass through so many Llama-3.2-1B layers keeps, for each token: an exact trace."""
    import weakref

    import transformers as tf
    from torch.utils._python_dispatch import TorchDispatchMode

    alive, weights = {}, set()

    class Trace(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor) and (key := t.untyped_storage()._cdata) not in {*alive, *weights}:
                    alive[key] = t.untyped_storage().nbytes()
                    weakref.finalize(t.untyped_storage(), alive.pop, key, None)
            return out

    config = tf.LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32,
                            num_key_value_heads=8, head_dim=64, vocab_size=256, attn_implementation="sdpa",
                            dtype="bfloat16")
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(config).to(torch.bfloat16)
    model = wrap(model.to_empty(device="cpu")).train()       # what the weights are does not matter
    x = torch.zeros(1, tokens, 2048, dtype=torch.bfloat16, requires_grad=True)
    weights |= {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    with Trace():
        y = model(inputs_embeds=x, use_cache=False).logits
        return sum(alive.values()) / tokens, y


def test_activations_kept_for_each_token_and_layer_of_llama_1b():
    from peft import LoraConfig, get_peft_model

    from pefttools.inject import attach

    def ours(model):
        return attach(model, LoRAConfig(r=16, target_modules="all-linear"))

    def theirs(model):
        return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))

    per_layer = {wrap: (kept(3, wrap)[0] - kept(2, wrap)[0]) / 1024 for wrap in (ours, theirs)}
    assert 150 < per_layer[theirs] < 160
    assert per_layer[ours] == pytest.approx(99, abs=0.6)      # 98, and z: 16 numbers for each of seven layers


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)])
def test_merged_equals_unmerged_within_the_rounding_of_the_weight(dtype, error):
    ours, _ = pair(dtype=dtype, d_in=64, d_out=64, r=8)
    x = torch.randn(16, 64, dtype=dtype)
    unmerged = ours(x)
    ours.merge()
    assert ours.merged and not torch.equal(ours(x), F.linear(x, ours._original_weight, ours.base_layer.bias))
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


# ------------------------------------------------------------------------------------------------ its node of autograd

def random_layer(base, r=3, alpha=7, **options):
    layer = LoRALinear(base, r, alpha, **options)
    with torch.no_grad():
        for parameter in layer.adapter_parameters().values():
            parameter.normal_()
    return layer


def plain(layer, x):
    """What the layer computes, as tensor operations."""
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return plain_update(layer.base_layer(x), x, A, B, layer.scaling["default"])


def derivatives(run, layer, x):
    y = run(x)
    inputs = [t for t in (x, *layer.adapter_parameters().values()) if t.requires_grad]
    return (y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)).sum(), inputs))


def assert_all_close(got, expected, tolerance=1e-6):
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * (b.abs().max().item() if b.numel() else 0))


@pytest.mark.parametrize("scale", [1.0, 2.0, -0.5, 1.75])
@pytest.mark.parametrize("base", [True, False])
def test_gradgradcheck(scale, base):
    layer = random_layer(nn.Linear(5, 4).double(), 2, 2 * scale)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    A, B = (p.detach().clone().requires_grad_() for p in layer.adapter_parameters().values())

    def run(x, A, B, result=None):
        if base:
            return torch.func.functional_call(layer, dict(zip(layer.adapter_parameters(), (A, B))), x)
        return add_update(result, x, A, B, scale)

    inputs = (x, A, B) if base else (x, A, B, torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(run, inputs) and torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("frozen", [(), ("x",), ("A",), ("B",), ("x", "A"), ("A", "B"), ("x", "B")])
def test_what_needs_no_gradient_gets_none(frozen):
    layer = random_layer(nn.Linear(6, 5))
    x = torch.randn(4, 6, requires_grad="x" not in frozen)
    for part in "AB":
        getattr(layer, f"lora_{part}")["default"].weight.requires_grad_(part not in frozen)
    assert_all_close(derivatives(layer, layer, x), derivatives(lambda x: plain(layer, x), layer, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_x_in_any_memory_order_and_an_expanded_gradient(dtype):
    layer = random_layer(nn.Linear(6, 5).to(dtype))
    for x in (torch.randn(6, 4, 3).permute(1, 2, 0), torch.randn(8, 12)[:, ::2], torch.randn(1, 6).expand(4, 6),
              torch.randn(6), torch.randn(0, 6), torch.randn(2, 0, 6)):
        x = x.to(dtype).detach().requires_grad_()
        assert torch.equal(layer(x), plain(layer, x))
        for run in (layer, lambda x: plain(layer, x)):
            run(x).sum().backward()                       # its gradient is one number, expanded
        got, layer.lora_A["default"].weight.grad = layer.lora_A["default"].weight.grad, None
        assert got.isfinite().all()


def test_twice_in_one_graph_and_after_another_use_of_the_result():
    layer = random_layer(nn.Linear(6, 6))
    x = torch.randn(4, 6, requires_grad=True)
    assert_all_close(derivatives(lambda x: layer(layer(x).tanh()), layer, x),
                     derivatives(lambda x: plain(layer, plain(layer, x).tanh()), layer, x))
    assert_all_close(derivatives(lambda x: layer(x).relu_() + x, layer, x),          # in place on what it returned
                     derivatives(lambda x: plain(layer, x).relu() + x, layer, x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint

    layer = random_layer(nn.Linear(6, 6))
    x = torch.randn(4, 6, requires_grad=True)
    got, expected = [], []
    for into, run in ((got, lambda x: checkpoint(layer, x, use_reentrant=reentrant)), (expected, layer)):
        for tensor in (x, *layer.adapter_parameters().values()):
            tensor.grad = None
        y = run(x)
        y.square().sum().backward()
        into += [y.detach(), x.grad] + [p.grad for p in layer.adapter_parameters().values()]
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_who_listens_to_the_base_layer_hears_its_own_output_and_may_change_it():
    x = torch.randn(4, 6)
    for attribute in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        layer, heard = random_layer(nn.Linear(6, 5)), []
        alone = layer.base_layer(x)
        getattr(layer.base_layer, attribute)(lambda *what: heard.append(what))
        derivatives(layer, layer, x.clone().requires_grad_())
        assert len(heard) == 1
        if attribute == "register_forward_hook":
            assert torch.equal(heard[0][2], alone)        # not overwritten with the sum
    layer = random_layer(nn.Linear(6, 5))
    layer.base_layer.register_forward_hook(lambda module, inputs, y: y.exp())        # keeps its output for backward
    assert_all_close(derivatives(layer, layer, x.requires_grad_()), derivatives(lambda x: plain(layer, x), layer, x))

    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, y: heard.append(module))
    layer = random_layer(nn.Linear(6, 5))
    layer(x)
    handle.remove()
    assert layer.base_layer in heard

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = random_layer(Doubled(6, 5))
    assert torch.equal(layer(x), plain(layer, x))
    layer = random_layer(nn.Linear(6, 5))
    layer.base_layer.forward = lambda x: torch.ones(4, 5)   # as accelerate's hooks do it
    assert torch.equal(layer(x), plain(layer, x))


def test_an_unfrozen_base_gets_its_gradient():
    layer = random_layer(nn.Linear(6, 5))
    layer.base_layer.requires_grad_(True)
    x = torch.randn(4, 6)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.base_layer.weight.grad, x.sum(0).expand(5, 6))
    assert torch.equal(layer.base_layer.bias.grad, torch.full((5,), 4.0))


def test_no_grad_inference_mode_and_deepcopy():
    layer = random_layer(nn.Linear(6, 5))
    x = torch.randn(4, 6)
    expected = layer(x).detach()
    with torch.no_grad():
        assert torch.equal(layer(x), expected) and not layer(x).requires_grad
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
    assert torch.equal(twin(x), expected)


def test_autocast_equals_pefts():
    ours, theirs = pair()
    x = torch.randn(9, 48)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = everything(ours, x), everything(theirs, x)
    assert got["y"].dtype == torch.bfloat16
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_torch_func_fake_tensors_and_compile():
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = random_layer(nn.Linear(6, 5))
    keys, values = list(layer.adapter_parameters()), [p.detach() for p in layer.adapter_parameters().values()]
    x = torch.randn(4, 6)

    def loss(values, x):
        return torch.func.functional_call(layer, dict(zip(keys, values)), x).square().sum()

    layer(x).square().sum().backward()
    for got, p in zip(torch.func.grad(loss)(values, x), layer.adapter_parameters().values()):
        torch.testing.assert_close(got, p.grad)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x)
    torch.testing.assert_close(each[0].sum(0), layer.lora_A["default"].weight.grad)
    torch.testing.assert_close(torch.func.jacfwd(layer)(x[0]), layer.base_layer.weight + layer.delta())
    with torch.device("meta"):
        assert LoRALinear(nn.Linear(6, 5), 3, 6)(torch.empty(4, 6)).shape == (4, 5)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    with FakeTensorMode():
        fake = LoRALinear(nn.Linear(600, 5000, dtype=torch.bfloat16), 3, 6)
        y = fake(torch.empty(400, 600, dtype=torch.bfloat16, requires_grad=True))
        y.sum().backward()
        assert y.shape == (400, 5000) and fake.lora_B["default"].weight.grad.shape == (5000, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_bitsandbytes_4_bits_equals_pefts(dtype):
    import bitsandbytes as bnb
    from peft import LoraConfig
    from peft.tuners.lora.bnb import Linear4bit
    from peft.tuners.tuners_utils import cast_adapter_dtype

    def quantized():
        torch.manual_seed(0)
        base = bnb.nn.Linear4bit(64, 128, bias=False, quant_type="nf4", compute_dtype=dtype)
        base.support_avx512bf16_for_cpu = False          # what its first evaluation would do to it: see the doctor
        return base.to("cpu")

    ours = random_layer(quantized(), 4, 8)
    config = LoraConfig(r=4, lora_alpha=8)
    theirs = Linear4bit(quantized().requires_grad_(False), "default", config=config, r=4, lora_alpha=8)
    cast_adapter_dtype(theirs, "default")
    theirs.lora_A["default"].weight.data.copy_(ours.lora_A["default"].weight)
    theirs.lora_B["default"].weight.data.copy_(ours.lora_B["default"].weight)
    x = torch.randn(5, 64, dtype=dtype)
    got, expected = everything(ours, x), everything(theirs, x)
    if dtype == torch.float32:
        assert_same(got, expected)
    else:                   # peft rounds the update before the sum here, and not beside nn.Linear; ours is once in both
        for name, theirs in expected.items():
            torch.testing.assert_close(got[name], theirs, rtol=2e-2, atol=2e-2 * theirs.abs().max().item())
    with pytest.raises(TypeError, match="dequantize the layer first"):
        ours.merge()


# ------------------------------------------------------------------------------------------------ several adapters

def two(base):
    layer = random_layer(base)
    layer.add("b", LoRAConfig(r=2, alpha=3, rslora=True))
    with torch.no_grad():
        layer.lora_B["b"].weight.normal_()
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_active_adapters_equal_pefts(dtype):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import cast_adapter_dtype

    base = nn.Linear(6, 5).to(dtype)
    theirs = peft_linear(copy.deepcopy(base), 3, 7)
    theirs.update_layer("b", 2, 3, config=LoraConfig(r=2, lora_alpha=3, use_rslora=True))
    cast_adapter_dtype(theirs, "b")
    theirs.set_adapter(["default", "b"])
    ours = two(base)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 6, dtype=dtype)
    for active in (["default"], ["b"], ["default", "b"], ["b", "default"]):
        theirs.set_adapter(active)
        ours.active = dict.fromkeys(active, 1.0)
        assert torch.equal(ours(x), theirs(x)), active


def test_weights_of_adapters_and_what_they_merge_to():
    layer = two(nn.Linear(6, 5))
    x = torch.randn(4, 6)
    layer.active = {"default": 0.25, "b": -2.0}
    weight = layer.base_layer.weight + 0.25 * layer.delta("default") - 2 * layer.delta("b")
    expected = F.linear(x, weight, layer.base_layer.bias)
    torch.testing.assert_close(layer(x), expected)
    layer.merge()
    torch.testing.assert_close(layer(x), expected)
    layer.unmerge()
    layer.active = {}
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.active = {"b": 0.0}
    torch.testing.assert_close(layer(x), layer.base_layer(x))


def test_settings_of_each_adapter_and_removal():
    layer = two(nn.Linear(6, 5))
    assert layer.scaling == {"default": 7 / 3, "b": 3 / 2 ** 0.5} and (layer.r, layer.alpha) == (3, 7)
    assert set(layer.adapter_parameters("b")) == {"lora_A.b.weight", "lora_B.b.weight"}
    assert set(layer.file_tensors("b")) == {"lora_A.weight", "lora_B.weight"}
    layer.scaling = 0.5
    assert layer.scaling == {"default": 0.5, "b": 0.5}
    layer.remove("default")
    assert layer.names == ["b"] and layer.r == 2
    assert list(layer.scaling) == ["b"] and "default" not in layer.lora_dropout
    with pytest.raises(ValueError, match="init_lora_weights must be one of"):
        LoRAConfig(init="zeros")
    with pytest.raises(ValueError, match="r must be even"):
        layer.add("c", LoRAConfig(r=3, init="orthogonal"))
    assert layer.names == ["b"]


def test_default_targets_are_pefts_for_every_family_it_knows(small_model):
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFTS

    assert DEFAULT_TARGETS == PEFTS and len(PEFTS) > 30
    assert LoRAConfig().default_targets(small_model("gpt2")) == ["c_attn"]
    with pytest.raises(ValueError, match="target_modules must be given"):
        LoRAConfig().default_targets(nn.Linear(2, 2))


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
    with pytest.raises(TypeError, match="this is a Embedding, and LoRA wraps linear layers"):
        LoRALinear(nn.Embedding(4, 4), 2, 4)
