"""pefttools.adapters: the bottleneck against the formula written out, counts, starts, dtypes, wrong arguments."""
from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pefttools.adapters import (ACTIVATIONS, BottleneckAdapter, activation_function, bottleneck_forward,
                                bottleneck_init, bottleneck_size, bottleneck_update)

pytestmark = pytest.mark.usefixtures("one_thread")
BY_HAND = {
    "relu": lambda z: z * (z > 0), "gelu": lambda z: z * (1 + torch.erf(z / math.sqrt(2))) / 2,
    "gelu_tanh": lambda z: z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3))) / 2,
    "silu": lambda z: z / (1 + torch.exp(-z)), "tanh": lambda z: (torch.exp(2 * z) - 1) / (torch.exp(2 * z) + 1),
    "sigmoid": lambda z: 1 / (1 + torch.exp(-z)), "leaky_relu": lambda z: torch.where(z > 0, z, 0.01 * z),
    "identity": lambda z: z}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def trained(*args, seed=0, **kwargs):
    """An adapter whose parameters are all away from their start."""
    adapter = BottleneckAdapter(*args, **kwargs, generator=generator(seed))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator(seed + 1), dtype=parameter.dtype)
    return adapter


# ------------------------------------------------------------------------------------------------ the formula

def test_every_activation_is_its_definition():
    z = torch.linspace(-4, 4, 101, dtype=torch.float64)
    assert set(ACTIVATIONS) == set(BY_HAND)
    for name, f in BY_HAND.items():
        torch.testing.assert_close(activation_function(name)(z), f(z), msg=lambda m, name=name: f"{name}: {m}")


@settings(max_examples=40, deadline=None)
@given(d=st.integers(1, 12), m=st.integers(1, 6), batch=st.lists(st.integers(0, 3), max_size=3),
       activation=st.sampled_from(sorted(ACTIVATIONS)), scale=st.floats(-4, 4), biases=st.booleans(),
       seed=st.integers(0, 99))
def test_forward_is_the_formula_for_any_shape(d, m, batch, activation, scale, biases, seed):
    g = generator(seed)
    h, down, b, up, b_up = (torch.randn(*shape, generator=g, dtype=torch.float64)
                            for shape in ((*batch, d), (m, d), (m,), (d, m), (d,)))
    b, b_up = (b, b_up) if biases else (None, None)
    z = torch.einsum("md,...d->...m", down, h) + (b if biases else 0)
    expected = scale * (torch.einsum("dm,...m->...d", up, BY_HAND[activation](z)) + (b_up if biases else 0))
    torch.testing.assert_close(bottleneck_update(h, down, b, up, b_up, activation, scale), expected)
    torch.testing.assert_close(bottleneck_forward(h, down, b, up, b_up, activation, scale), h + expected)


@pytest.mark.parametrize("layer_norm", [False, "before", "after"])
@pytest.mark.parametrize("scale", [1.0, 4, -0.5, "learned"])
def test_module_is_the_formula(layer_norm, scale):
    adapter = trained(10, 3, "gelu", scale=scale, layer_norm=layer_norm, dtype=torch.float64)
    h = torch.randn(2, 5, 10, generator=generator(9), dtype=torch.float64)

    def norm(t):
        mean, var = t.mean(-1, keepdim=True), t.var(-1, keepdim=True, unbiased=False)
        return (t - mean) / (var + 1e-5).sqrt() * adapter.norm.weight + adapter.norm.bias

    read = norm(h) if layer_norm == "before" else h
    u = BY_HAND["gelu"](read @ adapter.down.weight.T + adapter.down.bias) @ adapter.up.weight.T + adapter.up.bias
    u = norm(u) if layer_norm == "after" else u
    expected = h + (adapter.scale if scale == "learned" else scale) * u
    torch.testing.assert_close(adapter(h), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(adapter.update(h), expected - h, rtol=1e-10, atol=1e-12)
    if scale == "learned":
        assert adapter.scale.item() != 1 and "scale" in dict(adapter.named_parameters())


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("layer_norm, scale", [(False, 1.0), ("before", 4.0), ("after", "learned")])
def test_gradcheck(activation, layer_norm, scale):
    adapter = trained(5, 3, activation, scale=scale, layer_norm=layer_norm, dtype=torch.float64)
    h = torch.randn(2, 4, 5, generator=generator(5), dtype=torch.float64, requires_grad=True)
    names = list(dict(adapter.named_parameters()))

    def run(h, *values):
        return torch.func.functional_call(adapter, dict(zip(names, values)), h)

    assert torch.autograd.gradcheck(run, (h, *adapter.parameters()))


def test_without_an_activation_it_is_a_matrix_of_rank_m_and_with_one_it_is_not():
    h = torch.eye(12, dtype=torch.float64)
    for activation, linear in (("identity", True), ("relu", False)):
        adapter = trained(12, 3, activation, dtype=torch.float64)
        offset = adapter.update(torch.zeros(1, 12, dtype=torch.float64))
        matrix = adapter.update(h) - offset
        assert torch.allclose(adapter.update(2 * h) - offset, 2 * matrix) is linear
        assert torch.linalg.matrix_rank(matrix) == 3


# ------------------------------------------------------------------------------------------------ the start, the count

def test_zero_start_is_the_identity_to_the_last_bit_and_learns():
    h = torch.randn(4, 7, 24, generator=generator())
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for layer_norm in (False, "before"):
            adapter = BottleneckAdapter(24, 5, layer_norm=layer_norm)
            assert torch.equal(adapter(h.to(dtype)), h.to(dtype))
    adapter(h).square().sum().backward()
    assert adapter.up.weight.grad.any() and not adapter.down.weight.grad.any()


def test_houlsby_start_is_near_the_identity_and_not_it():
    adapter = BottleneckAdapter(256, 32, init="houlsby", generator=generator())
    for weight in (adapter.down.weight, adapter.up.weight):
        assert 0.0085 < weight.std() < 0.0092 and weight.abs().max() <= 0.02       # 0.88 σ is left of σ cut off at 2 σ
    assert not adapter.down.bias.any() and not adapter.up.bias.any()
    h = torch.randn(8, 256, generator=generator(1))
    away = (adapter(h) - h).norm() / h.norm()
    assert 0 < away < 0.01


def test_zero_start_has_loras_bound_and_needs_no_global_randomness():
    before = torch.get_rng_state()
    down, up = bottleneck_init(400, 16, generator=generator(1))
    assert torch.equal(down, bottleneck_init(400, 16, generator=generator(1))[0])
    BottleneckAdapter(20, 4, generator=generator(2))
    assert torch.equal(before, torch.get_rng_state())
    assert not up.any() and 0.99 / 20 < down.abs().max() <= 1 / 20


@pytest.mark.parametrize("d, m", [(2048, 64), (768, 48), (1, 1), (7, 9)])
def test_count_is_2md_d_m(d, m):
    adapter = BottleneckAdapter(d, m)
    assert sum(p.numel() for p in adapter.parameters()) == 2 * m * d + d + m == bottleneck_size(d, m)
    with_norm = BottleneckAdapter(d, m, layer_norm="before", scale="learned")
    assert sum(p.numel() for p in with_norm.parameters()) == bottleneck_size(d, m) + 2 * d + 1


def test_the_number_in_the_docstring():
    assert bottleneck_size(2048, 64) == 264_256


# ------------------------------------------------------------------------------------------------ dtypes, memory

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_beside_a_model_of_16_bits_it_computes_in_32_and_rounds_once(dtype):
    adapter = trained(16, 4, "gelu")
    h = torch.randn(3, 16, generator=generator(3)).to(dtype)
    expected = (h.float() + adapter.update(h.float())).to(dtype)
    assert adapter(h).dtype == dtype and torch.equal(adapter(h), expected)
    assert adapter.update(h).dtype == torch.float32


def test_what_is_kept_for_the_backward_pass_is_h_and_the_bottleneck_only():
    adapter, h = trained(64, 4, "relu", scale=4.0), torch.randn(10, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adapter(h)
    own = {p.data_ptr() for p in adapter.parameters()} | {h.data_ptr()}
    extra = {t.data_ptr(): t.numel() for t in kept if t.data_ptr() not in own}
    assert sum(extra.values()) == 10 * 4          # relu's output, shared by relu and W_up


def test_dropout_acts_in_the_bottleneck_while_training():
    adapter = trained(8, 6, "sigmoid", dropout=0.5)
    h = torch.randn(5, 8)
    torch.manual_seed(3)
    got = adapter.train()(h)
    torch.manual_seed(3)
    z = F.dropout(torch.sigmoid(adapter.down(h)), 0.5)
    torch.testing.assert_close(got, h + adapter.up(z))
    assert torch.equal(adapter.eval()(h), adapter(h))


def test_odd_inputs():
    adapter = trained(6, 2)
    assert adapter(torch.zeros(0, 6)).shape == (0, 6) and adapter(torch.zeros(3, 0, 6)).shape == (3, 0, 6)
    h = torch.randn(6, 4).T
    assert not h.is_contiguous() and torch.allclose(adapter(h), adapter(h.contiguous()))
    assert torch.allclose(adapter(h[0]), adapter(h[:1])[0])
    with torch.no_grad():
        assert not adapter(h).requires_grad
    twin = copy.deepcopy(adapter)
    assert torch.equal(twin(h), adapter(h)) and twin.up.weight is not adapter.up.weight


# ------------------------------------------------------------------------------------------------ wrong arguments

@pytest.mark.parametrize("change, message", [
    ({"d_model": 0}, "d_model must be a whole number, 1 or more; got 0"),
    ({"bottleneck": 0}, "bottleneck must be a whole number, 1 or more; got 0"),
    ({"bottleneck": 2.0}, "bottleneck must be a whole number.*got 2.0"),
    ({"bottleneck": True}, "bottleneck must be a whole number.*got True"),
    ({"activation": "gelo"}, "activation must be one of relu, gelu, gelu_tanh, silu, tanh.*got 'gelo'"),
    ({"scale": 0}, "scale must be a finite number other than 0, or \"learned\"; got 0"),
    ({"scale": float("nan")}, "scale must be a finite number.*got nan"),
    ({"scale": "learnt"}, "scale must be a finite number.*got 'learnt'"),
    ({"scale": True}, "scale must be a finite number.*got True"),
    ({"dropout": 1.0}, r"dropout must be a probability in \[0, 1\); got 1.0"),
    ({"layer_norm": "inside"}, "layer_norm must be one of False, 'before', 'after'; got 'inside'"),
    ({"init": "xavier"}, "init must be one of 'zero', 'houlsby'; got 'xavier'"),
])
def test_settings_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        BottleneckAdapter(**({"d_model": 8, "bottleneck": 2} | change))


@pytest.mark.parametrize("change, message", [
    ({"h": (3, 4)}, r"h must be \[\.\.\., d=5\].*got \[3, 4\]"), ({"h": ()}, r"h must be \[\.\.\., d=5\]"),
    ({"down": (5,)}, r"W_down must be \[m, d\]; got shape \[5\]"),
    ({"up": (2, 5)}, r"W_up must be \[d=5, m=2\].*got \[2, 5\]"),
    ({"b": (5,)}, r"b_down must be \[2\]; got shape \[5\]"), ({"b_up": (2,)}, r"b_up must be \[5\]; got shape \[2\]"),
])
def test_forward_names_the_tensor_of_the_wrong_shape(change, message):
    shapes = {"h": (3, 5), "down": (2, 5), "b": (2,), "up": (5, 2), "b_up": (5,)} | change
    with pytest.raises(ValueError, match=message):
        bottleneck_forward(*(torch.zeros(shape) for shape in shapes.values()))
    with pytest.raises(ValueError, match="activation must be one of"):
        bottleneck_forward(*(torch.zeros(s) for s in ((3, 5), (2, 5), (2,), (5, 2), (5,))), activation="swish")


def test_module_names_the_width_it_wants():
    with pytest.raises(ValueError, match=r"h must be \[\.\.\., d_model=8\]; got \[2, 7\]"):
        BottleneckAdapter(8, 2)(torch.zeros(2, 7))
