"""LoRA's starts: the matrices, what they do to the base weight, and the way back, against peft's."""
from __future__ import annotations

import copy
import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pefttools.checkpoint import load_adapter, save_adapter
from pefttools.inject import adapter_parameters, attach, detach, disabled, merge, trainable
from pefttools.lora import LoRAConfig
from pefttools.lora_convert import replace_lora_weights_loftq, to_plain_lora
from pefttools.lora_init import changes_base, check_start, dense_weight, start_from_peft, start_to_peft
from pefttools.lora_starts import (gaussian_start, loftq_start, olora_start, orthogonal_start, principal_parts,
                                   random_B)

pytestmark = pytest.mark.usefixtures("one_thread")


def peft_layer(base, r, alpha, start, **options):
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    conv1d = type(base).__name__ == "Conv1D"
    config = LoraConfig(r=r, lora_alpha=alpha, init_lora_weights=start, fan_in_fan_out=conv1d, **options)
    return Linear(base, "default", config=config, r=r, lora_alpha=alpha, is_target_conv_1d_layer=conv1d)


def values(layer):
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


# ------------------------------------------------------------------------------------------------ the matrices

@pytest.mark.parametrize("start, make", [("gaussian", gaussian_start), ("orthogonal", orthogonal_start)])
def test_random_starts_are_pefts_from_the_same_random_numbers(start, make):
    base = nn.Linear(40, 24)
    theirs = peft_layer(base, 6, 6, False)
    torch.manual_seed(7)
    theirs.orthogonal_init("default") if start == "orthogonal" else theirs.reset_lora_parameters("default", start)
    for ours, expected in zip(make(40, 24, 6, torch.Generator().manual_seed(7)), values(theirs)):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("start", [True, False])
def test_uniform_starts_are_pefts_in_distribution(start):
    ours = values(layer_of(nn.Linear(400, 300), start, r=16))
    for mine, expected in zip(ours, values(peft_layer(nn.Linear(400, 300), 16, 16, start))):
        assert abs(mine.std() - expected.std()) <= 0.02 * expected.std()
        assert mine.abs().max() <= expected.abs().max() * 1.01
    assert (ours[1].abs().sum() == 0) == start
    assert random_B(30, 4, torch.Generator().manual_seed(0)).abs().max() <= 0.5                   # 1/√4


def test_orthogonal_starts_with_no_update_and_with_neither_factor_zero():
    A, B = orthogonal_start(64, 48, 8, torch.Generator().manual_seed(0))
    assert (B @ A).abs().max() < 1e-6 * B.norm() * A.norm() and A.abs().min() > 0 and B.abs().min() > 0
    with pytest.raises(ValueError, match="even"):
        orthogonal_start(64, 48, 7)


@given(d_out=st.integers(2, 40), d_in=st.integers(2, 40), r=st.integers(1, 40), scaling=st.sampled_from([1, 2, 0.3]),
       seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_principal_parts_are_the_best_approximation_of_their_rank(d_out, d_in, r, scaling, seed):
    r = min(r, d_out, d_in)
    W = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    A, B = principal_parts(W, r, scaling)
    assert A.shape == (r, d_in) and B.shape == (d_out, r)
    S = torch.linalg.svdvals(W)
    assert torch.linalg.svdvals(W - scaling * B @ A)[0] <= (S[r] if r < len(S) else 0) + 1e-9      # Eckart–Young
    torch.testing.assert_close(A @ A.T, B.T @ B, rtol=1e-9, atol=1e-9)                             # evenly shared
    torch.testing.assert_close(A.norm() ** 2, S[:r].sum() / scaling, rtol=1e-9, atol=1e-9)


def test_the_worked_number():
    u, _ = torch.linalg.qr(torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).double())
    v, _ = torch.linalg.qr(torch.randn(4, 3, generator=torch.Generator().manual_seed(2)).double())
    W = u @ torch.diag(torch.tensor([3.0, 2, 1]).double()) @ v.T
    A, B = principal_parts(W, 1, 1.0)
    torch.testing.assert_close(A.abs(), 3 ** 0.5 * v[:, :1].T.abs())
    torch.testing.assert_close(B.abs(), 3 ** 0.5 * u[:, :1].abs())
    torch.testing.assert_close(torch.linalg.svdvals(W - B @ A)[:2], torch.tensor([2.0, 1]).double())


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (40, 40)])
def test_randomised_svd_is_torchs_from_the_same_random_numbers(shape):
    W = torch.randn(shape)
    torch.manual_seed(11)
    U, S, V = torch.svd_lowrank(W, 5, niter=3)
    A, B = principal_parts(W, 5, 2.0, 3, torch.Generator().manual_seed(11))
    torch.testing.assert_close(2 * B @ A, U @ torch.diag(S) @ V.T, rtol=1e-4, atol=1e-5)


def test_more_power_iterations_come_nearer_to_the_exact_one():
    W = torch.randn(80, 60, generator=torch.Generator().manual_seed(0)).double()
    exact = torch.linalg.svdvals(W)[:8].square().sum()
    found = [2 * principal_parts(W, 8, 2.0, n, torch.Generator().manual_seed(0))[0].square().sum() for n in (0, 2, 16)]
    of_exact = [torch.linalg.svdvals(W)[:8].sum() - f for f in found]
    assert of_exact[0] > of_exact[1] > of_exact[2] >= -1e-9 and of_exact[2] < 0.02 * exact.sqrt()


def test_olora_has_orthonormal_columns():
    W = torch.randn(20, 30)
    A, B = olora_start(W, 6)
    torch.testing.assert_close(B.T @ B, torch.eye(6), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(B @ A, (B @ B.T) @ W, rtol=1e-4, atol=1e-5)     # the projection of W on those columns


@pytest.mark.parametrize("scaling", [0, -1.0])
def test_a_start_from_singular_values_needs_a_positive_scale(scaling):
    with pytest.raises(ValueError, match="alpha"):
        principal_parts(torch.randn(4, 4), 2, scaling)


def loftq_of_peft(weight, r, iterations):
    """peft's own function, which asks for a CUDA device, run on the CPU."""
    from peft.utils import loftq_utils

    source = inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"')
    scope = dict(vars(loftq_utils))
    exec(source, scope)
    return scope["loftq_init"](weight, 4, r, iterations)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_equals_pefts(iterations):
    from pefttools.nf4 import dequantize_nf4, quantize_nf4

    W = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 0.05
    Q, A, B = loftq_of_peft(W, 8, iterations)
    ours = loftq_start(W, 8, 1.0, lambda w: dequantize_nf4(quantize_nf4(w)), iterations)
    torch.testing.assert_close(ours[2], Q, rtol=0, atol=1e-7 if iterations == 1 else 1e-5)
    torch.testing.assert_close(ours[1] @ ours[0], B @ A, rtol=1e-4, atol=1e-6 if iterations == 1 else 1e-5)


def test_loftq_comes_nearer_to_the_weight_than_quantizing_alone_for_any_alpha():
    from pefttools.nf4 import dequantize_nf4, quantize_nf4

    def quantized(w):
        return dequantize_nf4(quantize_nf4(w))

    W = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 0.05
    plain = (W - quantized(W)).norm()
    for scaling in (0.25, 1.0, 4.0):
        errors = []
        for iterations in (1, 5):
            A, B, Q = loftq_start(W, 16, scaling, quantized, iterations)
            errors.append((W - Q - scaling * B @ A).norm())
            torch.testing.assert_close(quantized(Q), Q, rtol=0, atol=1e-7)       # what quantize_model will make of it
        assert errors[1] < errors[0] < 0.9 * plain
    with pytest.raises(ValueError, match="iterations"):
        loftq_start(W, 16, 1.0, quantized, 0)


# ------------------------------------------------------------------------------------------------ the setting

@pytest.mark.parametrize("given_, name", [
    (True, True), (None, True), ("kaiming", True), (False, False), ("Gaussian", "gaussian"), ("pissa", "pissa"),
    ("pissa_niter_16", "pissa_niter_16"), ("OLoRA", "olora"), ("loftq", "loftq"), ("loftq_iter_5", "loftq_iter_5"),
    ("orthogonal", "orthogonal")])
def test_the_setting_and_its_field_in_the_file(given_, name):
    assert check_start(given_) == name
    assert start_from_peft(start_to_peft(name)) == name
    assert changes_base(name) == str(name).startswith(("pissa", "olora", "loftq"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", [True, False, "gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal"])
def test_fields_are_pefts(start):
    from peft import LoraConfig

    fields = LoraConfig(init_lora_weights=start).to_dict()
    assert start_to_peft(start_from_peft(fields)) == {"init_lora_weights": fields["init_lora_weights"]}


def test_fields_of_loftq_are_pefts():
    from peft import LoftQConfig

    fields = {"init_lora_weights": "loftq", "loftq_config": vars(LoftQConfig(loftq_iter=5))}
    assert start_from_peft(fields) == "loftq_iter_5"
    assert start_to_peft("loftq_iter_5")["loftq_config"] == fields["loftq_config"]
    with pytest.raises(ValueError, match="loftq_bits=8"):
        start_from_peft({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8, "loftq_iter": 1}})


@pytest.mark.parametrize("start", ["eva", "corda", "lora_ga", "pissa_niter_", "pissa_niter_x", "loftq_iter_0", "zeros",
                                   3, [], 1.5])
def test_other_starts_are_refused_by_name(start):
    with pytest.raises(ValueError, match="init_lora_weights"):
        check_start(start)


# ------------------------------------------------------------------------------------------------ the layer

CHANGING = ["pissa", "pissa_niter_4", "olora", "loftq"]


def layer_of(base, start, r=6, alpha=12, seed=0, **options):
    return LoRAConfig(r=r, alpha=alpha, init=start, **options).build(base, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_base_weight_and_update_equal_pefts(start, dtype):
    torch.manual_seed(0)
    base = nn.Linear(40, 24).to(dtype)
    theirs = peft_layer(copy.deepcopy(base), 6, 12, start)
    ours = layer_of(copy.deepcopy(base), start)
    assert torch.equal(ours.base_layer.weight, theirs.get_base_layer().weight)
    A, B = values(ours)
    assert A.dtype == B.dtype == torch.float32
    expected_A, expected_B = (t.float() for t in values(theirs))                      # peft has them in 16 bits here
    torch.testing.assert_close(B @ A, expected_B @ expected_A, rtol=0, atol=2 * torch.finfo(dtype).eps)
    x = torch.randn(5, 40).to(dtype)
    torch.testing.assert_close(ours(x), base(x), rtol=0, atol=20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("start", ["pissa", "gaussian", True])
def test_conv1d_starts_as_pefts(start):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    base = Conv1D(24, 40)
    theirs = peft_layer(copy.deepcopy(base), 6, 12, start)
    ours = layer_of(copy.deepcopy(base), start)
    assert torch.equal(ours.base_layer.weight, theirs.get_base_layer().weight)
    assert ours.base_layer.weight.is_contiguous()
    x = torch.randn(5, 40)
    torch.testing.assert_close(ours(x), base(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal", *CHANGING])
def test_it_starts_with_the_outputs_of_the_layer_it_wraps_or_loftqs_near_them(start, conv1d):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    base = Conv1D(128, 64) if conv1d else nn.Linear(64, 128)
    x, expected = torch.randn(5, 64), None
    expected = base(x)
    layer = layer_of(base, start)
    difference = (layer(x) - expected).norm() / expected.norm()
    if start == "loftq":
        with torch.no_grad():
            alone = (base(x) - expected).norm() / expected.norm()
        assert 1e-3 < difference < alone < 0.2
    else:
        assert difference < 1e-6


def test_false_starts_with_an_update():
    layer = layer_of(nn.Linear(64, 32), False)
    assert (layer.lora_B["default"].weight != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", CHANGING)
def test_the_original_weight_comes_back_bit_by_bit(start, dtype):
    base = nn.Linear(64, 64).to(dtype)
    before, x = base.weight.detach().clone(), torch.randn(5, 64).to(dtype)
    layer = layer_of(base, start)
    residual, apart, parameter = base.weight.detach().clone(), layer(x), base.weight
    assert not torch.equal(residual, before)
    layer.merge()
    layer.unmerge()
    assert torch.equal(base.weight, residual) and torch.equal(layer(x), apart)
    layer.enabled = False
    assert torch.equal(layer(x), nn.functional.linear(x, before, base.bias)), "disabled: the model before, no residual"
    layer.enabled = False
    layer.enabled = True
    assert torch.equal(layer(x), apart)
    copied = copy.deepcopy(layer)
    layer.restore_base()
    layer.restore_base()
    assert torch.equal(base.weight, before) and base.weight is parameter and not list(layer.buffers())
    assert torch.equal(copied(x), apart), "a copy has its own weights"
    copied.enabled = False
    copied.restore_base()
    assert torch.equal(copied.base_layer.weight, before)


def test_what_is_kept_is_no_part_of_the_state_dict_and_moves_with_the_layer():
    layer = layer_of(nn.Linear(32, 32), "pissa")
    assert set(layer.state_dict()) == {"base_layer.weight", "base_layer.bias", "lora_A.default.weight",
                                       "lora_B.default.weight"}
    layer.to(torch.float64)
    layer.restore_base()
    assert layer.base_layer.weight.dtype == torch.float64


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    base = nn.Linear(32, 32)
    torch.set_rng_state(state)
    for start in (True, False, "gaussian", "orthogonal", "pissa_niter_1"):
        one, same, other = (layer_of(copy.deepcopy(base), start, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(values(one)[0], values(same)[0])
        # the randomised SVD's seed is fixed, so that a loaded adapter finds the residual it was trained on
        assert torch.equal(values(one)[0], values(other)[0]) == (start == "pissa_niter_1")
        assert torch.equal(one.base_layer.weight, other.base_layer.weight)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("start", CHANGING)
def test_a_changed_base_is_not_shared(start):
    layer = layer_of(nn.Linear(64, 64), start)
    weight = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="to_plain_lora"):
        layer.add("second", LoRAConfig(r=2))
    layer.remove("second")
    assert torch.equal(layer.base_layer.weight, weight)
    plain = layer_of(nn.Linear(64, 64), True)
    weight = plain.base_layer.weight.clone()
    with pytest.raises(ValueError, match="only adapter"):
        plain.add("second", LoRAConfig(r=2, init=start))
    assert torch.equal(plain.base_layer.weight, weight) and not list(plain.buffers())


@pytest.mark.parametrize("start, says", [("pissa", "before it is quantized"), ("olora", "before it is quantized"),
                                         ("loftq", "replace_lora_weights_loftq")])
def test_a_quantized_base_has_no_weight_to_decompose(start, says):
    from pefttools.qlora import NF4Linear

    with pytest.raises(TypeError, match=says):
        layer_of(NF4Linear(nn.Linear(64, 64)), start)
    for fine in (True, "gaussian", "orthogonal"):
        layer_of(NF4Linear(nn.Linear(64, 64)), fine)


def test_dense_weight_of_every_kind():
    from bitsandbytes.nn import Linear4bit
    from transformers.pytorch_utils import Conv1D

    from pefttools.qlora import NF4Linear

    linear = nn.Linear(64, 32)
    assert dense_weight(linear) is linear.weight
    conv = Conv1D(32, 64)
    assert torch.equal(dense_weight(conv), conv.weight.T)
    nf4 = NF4Linear(linear, double_quant=False)
    bnb = Linear4bit(64, 32, quant_type="nf4", compress_statistics=False)
    bnb.load_state_dict(linear.state_dict())
    assert torch.equal(dense_weight(nf4), dense_weight(bnb.to("cpu")))
    assert dense_weight(nf4, torch.float64).dtype == torch.float64


# ------------------------------------------------------------------------------------------------ models and files

def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def shaken(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def same_weights(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
@pytest.mark.parametrize("start", CHANGING)
def test_detach_and_disabled_give_the_model_back(start, method, small_model, small_inputs):
    from pefttools.dora import DoRAConfig

    make = {"LoRA": LoRAConfig, "DoRA": DoRAConfig}[method]
    model, inputs = small_model(), small_inputs()
    before = logits(model, inputs)
    attach(model, make(r=4, alpha=8, init=start, target_modules=["q_proj", "down_proj"]))
    if start != "loftq":
        torch.testing.assert_close(logits(model, inputs), before, rtol=1e-5, atol=1e-5)
    changed = logits(shaken(model), inputs)
    with disabled(model):
        assert torch.equal(logits(model, inputs), before)
    assert torch.equal(logits(model, inputs), changed)
    merge(model)
    with disabled(model):
        assert torch.equal(logits(model, inputs), before)
    assert same_weights(detach(model), small_model())


def test_an_attach_that_fails_leaves_the_weights_alone(small_model):
    model = small_model()
    config = LoRAConfig(r=4, init="pissa", target_modules=["q_proj", "k_proj"])
    broken = model.model.layers[2].self_attn.k_proj
    broken.weight.data[0, 0] = float("nan")                 # the decomposition of the last layer fails
    with pytest.raises((RuntimeError, ValueError)):
        attach(model, config)
    broken.weight.data.copy_(small_model().model.layers[2].self_attn.k_proj.weight)
    assert same_weights(model, small_model())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family, targets", [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn"]),
                                             ("bert", ["query"])])
@pytest.mark.parametrize("start", ["pissa", "olora", "gaussian", "orthogonal"])
def test_files_load_in_peft_and_back(start, family, targets, small_model, small_inputs, tmp_path):
    from peft import PeftModel

    if (family, start) == ("gpt2", "olora"):
        pytest.skip("peft's olora takes Conv1D's weight the wrong way round")
    inputs = small_inputs(family)
    model = shaken(attach(small_model(family), LoRAConfig(r=4, alpha=8, init=start, target_modules=targets)))
    mine = logits(model, inputs)
    save_adapter(model, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(small_model(family), str(tmp_path / "ours"))
    torch.testing.assert_close(logits(theirs, inputs), mine, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    back = load_adapter(small_model(family), tmp_path / "theirs")
    torch.testing.assert_close(logits(back, inputs), mine, rtol=1e-6, atol=1e-6)
    assert same_weights(detach(back), small_model(family))


@pytest.mark.parametrize("start", ["pissa_niter_2", "loftq_iter_3"])
def test_files_of_the_others_load_here(start, small_model, small_inputs, tmp_path):
    model = shaken(attach(small_model(), LoRAConfig(r=4, init=start, target_modules=["q_proj"]), seed=5))
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(small_model(), tmp_path), small_inputs()), logits(model, small_inputs()))


# ------------------------------------------------------------------------------------------------ conversions

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_1", "olora"])
def test_to_plain_lora_has_the_same_outputs_here_and_in_peft(start, method, rslora, small_model, small_inputs,
                                                             tmp_path):
    from peft import PeftModel

    from pefttools.dora import DoRAConfig

    make, inputs = {"LoRA": LoRAConfig, "DoRA": DoRAConfig}[method], small_inputs()
    config = make(r=4, alpha=8, init=start, rslora=rslora, target_modules=["q_proj", "down_proj"])
    model = shaken(attach(small_model(), config))
    before = logits(model, inputs)
    to_plain_lora(model)
    torch.testing.assert_close(logits(model, inputs), before, rtol=1e-5, atol=1e-5)
    assert set(trainable(model)) == set(adapter_parameters(model))
    assert any(p.shape[0] == 8 for name, p in trainable(model).items() if "lora_A" in name)
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(small_model(), str(tmp_path))
    torch.testing.assert_close(logits(theirs, inputs), before, rtol=1e-5, atol=1e-5)
    if method == "LoRA":
        attach(model, make(r=2, target_modules=["q_proj"]), name="second")        # the base may be shared again
    assert same_weights(detach(model), small_model())


@pytest.mark.filterwarnings("ignore")
def test_to_plain_lora_writes_the_tensors_that_pefts_conversion_writes(small_model, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import load_file

    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=["q_proj"])
    theirs = get_peft_model(small_model(), config)
    theirs.peft_config["default"].init_lora_weights = True                          # as peft's documentation says
    theirs.save_pretrained(str(tmp_path / "start"))
    theirs.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    theirs.save_pretrained(str(tmp_path / "trained"))
    theirs.save_pretrained(str(tmp_path / "converted"),
                           path_initial_model_for_weight_conversion=str(tmp_path / "start"))

    ours = to_plain_lora(load_adapter(small_model(), tmp_path / "trained"))
    save_adapter(ours, tmp_path / "ours")
    expected, got = (load_file(str(tmp_path / folder / "adapter_model.safetensors"))
                     for folder in ("converted", "ours"))
    assert set(got) == set(expected)
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-5, atol=1e-6, msg=key)


def test_to_plain_lora_refuses_what_it_cannot_do(small_model):
    model = attach(small_model(), LoRAConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="started from True"):
        to_plain_lora(model)
    with pytest.raises(ValueError, match="no adapter 'other'"):
        to_plain_lora(model, "other")
    with pytest.raises(ValueError, match="loftq"):
        to_plain_lora(attach(small_model(), LoRAConfig(r=4, init="loftq", target_modules=["q_proj"])))
    model = attach(small_model(), LoRAConfig(r=20, init="pissa", target_modules=["q_proj"]))     # 40 > 32
    with pytest.raises(ValueError, match="r"):
        to_plain_lora(model)
    model = merge(attach(small_model(), LoRAConfig(r=4, init="pissa", target_modules=["q_proj"])))
    with pytest.raises(ValueError, match="unmerge"):
        to_plain_lora(model)


@pytest.mark.filterwarnings("ignore")
def test_loftq_on_a_quantized_model_equals_pefts(small_model, small_inputs):
    import bitsandbytes as bnb
    from peft.utils import loftq_utils

    from pefttools.qlora import NF4Linear, quantize_model

    inputs, model = small_inputs(), small_model(hidden=64)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exact = logits(model, inputs)
    quantize_model(model, double_quant=False)
    attach(model, LoRAConfig(r=8, alpha=8, target_modules="all-linear"))
    quantized = logits(model, inputs)
    replace_lora_weights_loftq(model, weights)
    assert (logits(model, inputs) - exact).norm() < 0.9 * (quantized - exact).norm()

    scope = dict(vars(loftq_utils))
    exec(inspect.getsource(loftq_utils._loftq_init_new).replace('"cuda"', '"cpu"'), scope)
    layer, weight = model.model.layers[0].mlp.up_proj, weights["model.layers.0.mlp.up_proj.weight"]
    assert isinstance(layer.base_layer, NF4Linear)
    codes = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=False, quant_type="nf4").to("cpu")
    A, B = scope["_loftq_init_new"](codes, weight, 4, 8)
    got_A, got_B = values(layer)
    torch.testing.assert_close(got_B @ got_A, B @ A, rtol=1e-4, atol=1e-6)

    before = values(layer)[0].clone()
    with pytest.raises(KeyError, match="down_proj"):
        replace_lora_weights_loftq(model, {k: v for k, v in weights.items() if "down_proj" not in k})
    with pytest.raises(ValueError, match="the layer has"):
        replace_lora_weights_loftq(model, {k: v[:1] for k, v in weights.items()})
    assert torch.equal(values(layer)[0], before)
    with pytest.raises(ValueError, match="no quantized layer"):
        replace_lora_weights_loftq(attach(small_model(), LoRAConfig(r=2, target_modules=["q_proj"])), {})
