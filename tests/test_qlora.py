"""QLoRA: equal to bitsandbytes and peft, nothing dequantized kept, transformers' choice of layers, the same files."""
from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pefttools import nf4_linear as module
from pefttools import qlora
from pefttools.bench.memory import Trace, kept, peak_bytes
from pefttools.bnb import make_safe
from pefttools.inject import attach, count_parameters, detach, disabled, trainable
from pefttools.lora import LoRAConfig, LoRALinear
from pefttools.nf4 import quantize_nf4
from pefttools.qlora import NF4Linear, nf4_linear, quantizable, quantize_model, release_scratch

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
FAMILIES = ("llama", "qwen2", "gpt2", "opt", "bert", "t5")


def linear(d_in=256, d_out=64, bias=True, dtype=torch.float32, seed=0) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(d_in, d_out, bias)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 8
    return layer.to(dtype)


def theirs(base: nn.Linear, double=True, compute_dtype=None, block_size=64):
    """bitsandbytes' layer of the same weight, off its faulty paths."""
    bnb = pytest.importorskip("bitsandbytes").nn
    layer = bnb.Linear4bit(base.in_features, base.out_features, base.bias is not None, quant_type="nf4",
                           compute_dtype=compute_dtype or base.weight.dtype)
    layer.weight = bnb.Params4bit(base.weight.detach().clone(), requires_grad=False, quant_type="nf4", module=layer,
                                  compress_statistics=double, blocksize=block_size)
    if base.bias is not None:
        layer.bias.data = base.bias.detach().clone()
    return make_safe(layer.to("cpu")).requires_grad_(False).train()


def run(layer, x, direction):
    """(output, gradient of x)"""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    return y.detach(), torch.autograd.grad(y, x, direction)[0]


def relative(got, expected) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


# ------------------------------------------------------------------------------------------------ equal to bitsandbytes

@settings(max_examples=40, deadline=None)
@given(d_in=st.integers(1, 20).map(lambda n: 16 * n), d_out=st.integers(1, 40), bias=st.booleans(),
       double=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
       block=st.sampled_from([64, 128, 1024]),
       shape=st.sampled_from([(3,), (1, 1), (2, 5), (2, 1, 3)]))
def test_bit_identical_to_bitsandbytes(d_in, d_out, bias, double, dtype, block, shape):
    base = linear(d_in, d_out, bias, dtype)
    x, direction = torch.randn(*shape, d_in).to(dtype), torch.randn(*shape, d_out).to(dtype)
    ours, other = NF4Linear(base, block, double), theirs(base, double, block_size=block)
    for got, expected in zip(run(ours, x, direction), run(other, x, direction)):
        assert got.dtype == dtype and torch.equal(got, expected)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
def test_compute_dtype_is_bitsandbytes(compute):
    base = linear()
    x, direction = torch.randn(4, 256), torch.randn(4, 64)
    ours, other = NF4Linear(base, compute_dtype=compute), theirs(base, compute_dtype=compute)
    for got, expected in zip(run(ours, x, direction), run(other, x, direction)):
        assert got.dtype == torch.float32 and torch.equal(got, expected)
    assert ours.bias.dtype == torch.float32                      # theirs is rounded for good


def test_gradient_is_that_of_the_output_where_bitsandbytes_rounds_again():
    base = linear(dtype=torch.bfloat16)
    ours, other = NF4Linear(base, compute_dtype=torch.float32), theirs(base, compute_dtype=torch.float32)
    x, direction = torch.randn(4, 256), torch.randn(4, 64)
    (y, gradient), (their_y, theirs_gradient) = run(ours, x, direction), run(other, x, direction)
    assert torch.equal(y, their_y)
    assert relative(gradient, direction @ ours.dequantize(torch.float32)) < 1e-6
    assert 1e-4 < relative(theirs_gradient, gradient) < 5e-3     # the weight's dtype is in their backward only


def test_formula_from_the_definition():
    base = linear(96, 8)
    layer = NF4Linear(base, double_quant=False)
    q = layer.quantized
    codes = [nibble for byte in q.packed.view(-1).tolist() for nibble in (byte >> 4, byte & 15)]
    weight = (q.code[torch.tensor(codes)].view(-1, 64) * q.absmax[:, None]).view(8, 96)
    assert torch.equal(layer.dequantize(), weight) and relative(weight, base.weight) < 0.12
    x, direction = torch.randn(5, 96), torch.randn(5, 8)
    y, gradient = run(layer, x, direction)
    assert relative(y, x @ weight.T + base.bias) < 1e-6 and relative(gradient, direction @ weight) < 1e-6
    assert torch.equal(F.linear(x, weight), nf4_linear(x, quantize_nf4(base.weight)))
    assert torch.equal(direction @ weight, module.nf4_linear_back(direction, q))


# ------------------------------------------------------------------------------------------------ gradients

@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5)])
def test_gradcheck_and_of_the_gradient(shape):
    q = quantize_nf4(torch.randn(7, 5), double_quant=False)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: nf4_linear(x, q, b), (x, bias))
    assert torch.autograd.gradgradcheck(lambda x, b: nf4_linear(x, q, b), (x, bias))


def test_gradcheck_of_the_layer_and_of_lora_on_it():
    layer = NF4Linear(linear(24, 8), compute_dtype=torch.float64)
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    lora = LoRALinear(NF4Linear(linear(24, 8)), r=2, alpha=4).double()
    parameters = [p for p in lora.parameters() if p.is_floating_point() and p.requires_grad]
    for parameter in parameters:
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    assert len(parameters) == 2
    assert torch.autograd.gradcheck(lambda x, *_: lora(x), (x, *parameters))


def test_bias_learns_where_asked_to_and_weight_never():
    layer = NF4Linear(linear())
    assert not any(p.requires_grad for p in layer.parameters())
    layer.bias.requires_grad_()
    layer(torch.ones(3, 256)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((64,), 3.0)) and layer.weight.grad is None
    with pytest.raises(RuntimeError, match="floating"):
        layer.weight.requires_grad_()


def test_no_dequantizing_where_no_gradient_is_asked_for(monkeypatch):
    calls = []
    real = module.dequantize_nf4
    monkeypatch.setattr(module, "dequantize_nf4", lambda *a, **k: calls.append(1) or real(*a, **k))
    layer = NF4Linear(linear())
    layer.bias.requires_grad_()
    layer(torch.randn(2, 256)).sum().backward()                  # the first layer of a model: x needs no gradient
    assert len(calls) == 1
    layer(torch.randn(2, 256, requires_grad=True)).sum().backward()
    assert len(calls) == 3


# ------------------------------------------------------------------------------------------------ memory

def test_forward_keeps_nothing_dequantized():
    layer = NF4Linear(linear(512, 512, bias=False))
    x = torch.randn(4, 512, requires_grad=True)
    release_scratch()
    held = [h for h in kept(lambda: layer(x)) if h.bytes >= 4096]
    assert [h.bytes for h in held] == [512 * 512 * 4]            # the scratch, and nothing else
    assert not [h for h in kept(lambda: layer(x)) if h.bytes >= 4096]           # which is there from then on
    release_scratch()


DECODING = int(1.6 * 2 ** 20)    # what decoding allocates itself, for weights of any size (pefttools.nf4_kernels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_holds_one_dequantized_weight_for_all_layers(dtype):
    d, tokens, layers = 1024, 4, 4
    model = nn.Sequential(*[NF4Linear(linear(d, d, bias=False, dtype=dtype, seed=i)) for i in range(layers)])
    x = torch.randn(tokens, d, dtype=dtype, requires_grad=True)
    weight, activation = d * d * dtype.itemsize, tokens * d * dtype.itemsize
    release_scratch()
    first = peak_bytes(lambda: model(x).sum().backward())
    assert weight < first < weight + DECODING + (layers + 3) * activation
    x.grad = None
    again = peak_bytes(lambda: model(x).sum().backward())
    assert again < DECODING + (layers + 3) * activation < weight  # the scratch stays: nothing else is of full size
    assert release_scratch() == weight and release_scratch() == 0


def test_backward_alone_is_at_most_one_weight_above_its_floor():
    layer = NF4Linear(linear(1024, 1024, bias=False))
    x = torch.randn(2, 1024, requires_grad=True)
    weight = 1024 * 1024 * 4
    y = layer(x)                                                 # the floor: what there is between forward and backward
    with Trace() as trace:
        y.sum().backward()
    assert trace.peak < weight
    y, x.grad = layer(x), None
    release_scratch()                                            # given back in between: then exactly one weight more
    with Trace() as trace:
        y.sum().backward()
    assert weight <= trace.peak < weight + DECODING + 4 * 2 * 1024 * 4
    release_scratch()


def test_scratch_grows_and_is_shared_by_dtypes():
    release_scratch()
    small, large = NF4Linear(linear(64, 64)), NF4Linear(linear(128, 128))
    x = torch.randn(2, 64)
    y = small(x)
    large(torch.randn(2, 128).bfloat16())
    assert torch.equal(small(x), y)
    assert release_scratch() == 128 * 128 * 2


def test_threads_do_not_disturb_each_other():
    layers = [NF4Linear(linear(256, 256, seed=i)) for i in range(4)]
    x, direction = torch.randn(16, 256), torch.randn(16, 256)
    expected = [run(layer, x, direction) for layer in layers]
    wrong, start = [], threading.Barrier(4)

    def work(i):
        start.wait()
        for _ in range(50):
            if not all(map(torch.equal, run(layers[i], x, direction), expected[i])):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inference_mode_leaves_a_scratch_that_training_can_use():
    layer, x = NF4Linear(linear()), torch.randn(2, 256)
    release_scratch()
    with torch.inference_mode():
        y = layer(x)
    got, gradient = run(layer, x, torch.ones(2, 64))
    assert torch.equal(got, y) and gradient.any()


def test_fake_tensors_pass_without_touching_the_scratch():
    from torch._subclasses.fake_tensor import FakeTensorMode

    release_scratch()
    layer = NF4Linear(linear())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        layer.weight = nn.Parameter(mode.from_tensor(layer.weight.data), requires_grad=False)
        y = layer(torch.randn(2, 256, requires_grad=True))
        assert y.shape == (2, 64)
        y.sum().backward()
    assert release_scratch() == 0


def test_worked_numbers_of_the_docstrings():
    q = quantize_nf4(torch.randn(2048, 512), double_quant=True)
    assert q.bits_per_parameter == pytest.approx(4.127, abs=5e-4)
    up = 2048 * 8192
    assert up == 16_777_216 and up * 2 == 32 * 2 ** 20 and up * 4.12696 / 8 / 2 ** 20 == pytest.approx(8.25, abs=5e-3)
    linears = 16 * (2048 * 2048 * 2 + 2048 * 512 * 2 + 3 * up)
    assert linears == 973_078_528 and 1_235_814_400 - linears == 262_735_872
    assert 1_235_814_400 * 2 / 2 ** 30 == pytest.approx(2.30, abs=5e-3)
    assert (linears * 4.127 / 8 + 262_735_872 * 2) / 2 ** 30 == pytest.approx(0.96, abs=5e-3)


# ------------------------------------------------------------------------------------------------ a good module

def test_copies_pickles_and_files_are_whole_and_no_larger():
    layer, x = NF4Linear(linear(512, 128)), torch.randn(2, 512)
    y = layer(x)                                                 # there is a scratch now
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    data = pickle.dumps(layer)
    assert len(data) < 512 * 128 / 2 * 1.3                       # the codes once, and no scratch
    for other in (copy.deepcopy(layer), pickle.loads(data), torch.load(stream, weights_only=False)):
        assert torch.equal(other(x), y) and other.quantized.packed is other.weight
        other.weight.data.zero_()
        assert torch.equal(layer(x), y) and not torch.equal(other(x), y)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(),
                                  lambda m: m.type(torch.float16), lambda m: m.to("cpu", torch.bfloat16)])
def test_casting_leaves_codes_and_scales(cast):
    layer = NF4Linear(linear(512, 64))
    before = {k: v.clone() for k, v in layer.state_dict().items() if k != "bias"}
    dtype = cast(layer).bias.dtype
    assert dtype != torch.float32
    after = layer.state_dict()
    assert all(v.dtype == after[k].dtype and torch.equal(v, after[k]) for k, v in before.items())
    assert layer(torch.randn(2, 512, dtype=dtype)).dtype == dtype


def test_moving_takes_the_scales_along():
    layer = NF4Linear(linear()).to("meta")
    assert all(t.is_meta for t in vars(layer.quantized).values() if torch.is_tensor(t))
    assert layer(torch.empty(2, 256, device="meta")).shape == (2, 64)


def test_a_replaced_parameter_is_used():
    layer = NF4Linear(linear(seed=0))
    other = NF4Linear(linear(seed=1))
    layer.weight = nn.Parameter(other.weight.data.clone(), requires_grad=False)
    assert torch.equal(layer.quantized.packed, other.weight)


def test_odd_inputs():
    layer = NF4Linear(linear())
    weight, bias = layer.dequantize(), layer.bias
    for x in (torch.randn(256), torch.randn(0, 256), torch.randn(2, 0, 256), torch.randn(256, 6).T,
              torch.randn(4, 512)[:, ::2], torch.randn(1, 1, 256).expand(2, 3, 256)):
        assert torch.equal(layer(x), F.linear(x, weight, bias))
    for x in (torch.randn(2, 255), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"x must be \[\.\.\., d_in=256\]"):
            layer(x)
    odd = NF4Linear(linear(15, 7, bias=False))                   # 105 weights: half a byte is left over
    assert torch.equal(odd(torch.eye(15)), odd.dequantize().T)
    strided = nn.Linear(64, 32, bias=False)
    strided.weight = nn.Parameter(torch.randn(64, 32).T)
    assert torch.equal(NF4Linear(strided).weight, quantize_nf4(strided.weight.contiguous()).packed)


def test_autocast():
    layer, x = NF4Linear(linear()), torch.randn(4, 256)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
        high = NF4Linear(linear(), compute_dtype=torch.float32)(x)
    assert torch.equal(low, NF4Linear(linear(), compute_dtype=torch.bfloat16)(x))
    assert torch.equal(high, layer(x)) and not torch.equal(low, high)


def test_checkpointing_gives_the_same_gradients():
    from torch.utils.checkpoint import checkpoint

    model = nn.Sequential(*[NF4Linear(linear(64, 64, seed=i)) for i in range(3)])
    x = torch.randn(4, 64, requires_grad=True)
    expected = torch.autograd.grad(model(x).square().sum(), x)[0]
    for reentrant in (True, False):
        y = checkpoint(model, x, use_reentrant=reentrant)
        x.grad = None
        y.square().sum().backward()
        assert torch.equal(x.grad, expected)


def test_to_linear_computes_the_same():
    layer, x = NF4Linear(linear()), torch.randn(3, 256)
    plain = layer.to_linear()
    assert type(plain) is nn.Linear and torch.equal(plain(x), layer(x))
    assert layer.to_linear(torch.bfloat16).bias.dtype == torch.bfloat16
    assert plain.bias.data_ptr() != layer.bias.data_ptr()


def test_bad_arguments():
    with pytest.raises(TypeError, match="base must be an nn.Linear or transformers' Conv1D; got Embedding"):
        NF4Linear(nn.Embedding(3, 4))
    with pytest.raises(TypeError, match="quantized already"):
        NF4Linear(NF4Linear(linear()))
    with pytest.raises(ValueError, match="compute_dtype must be a floating-point dtype.*torch.uint8"):
        NF4Linear(linear(), compute_dtype=torch.uint8)
    bad = linear()
    bad.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        NF4Linear(bad)


# ------------------------------------------------------------------------------------------------ state dicts

@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_state_dict_is_bitsandbytes(double, bias):
    base = linear(512, 64, bias)
    ours, other = NF4Linear(base, double_quant=double), theirs(base, double)
    state, expected = ours.state_dict(), other.state_dict()
    assert set(state) == set(expected)
    for key, tensor in expected.items():
        assert state[key].dtype == tensor.dtype and state[key].shape == tensor.shape
        assert torch.equal(state[key], tensor)
    other_base = linear(512, 64, bias, seed=1)
    fresh, x = NF4Linear(other_base, double_quant=not double), torch.randn(2, 512)
    before = fresh.weight
    assert not fresh.load_state_dict(expected).missing_keys and fresh.weight is before
    assert torch.equal(fresh(x), other(x)) and fresh.quantized.nested == double
    expected["weight"].zero_()
    assert torch.equal(fresh(x), ours(x))                        # copied, not shared
    fresh.load_state_dict(state, assign=True)
    assert fresh.weight.data_ptr() == state["weight"].data_ptr()


def test_state_dict_inside_a_model_and_its_errors():
    model = nn.Sequential(NF4Linear(linear(64, 64, seed=0)), nn.ReLU(), NF4Linear(linear(64, 8, seed=1)))
    state, x = {k: v.clone() for k, v in model.state_dict().items()}, torch.randn(2, 64)
    other = nn.Sequential(NF4Linear(linear(64, 64, seed=2)), nn.ReLU(), NF4Linear(linear(64, 8, seed=3)))
    other.load_state_dict(state)
    assert torch.equal(other(x), model(x))
    with pytest.raises(RuntimeError, match="Missing key.*0.weight"):
        other.load_state_dict({k: v for k, v in state.items() if not k.startswith("0.weight")})
    with pytest.raises(RuntimeError, match="0.weight: .*not in 4 bits.*before quantize_model"):
        other.load_state_dict({**{k: v for k, v in state.items() if not k.startswith("0.weight.")},
                               "0.weight": torch.randn(64, 64)})
    with pytest.raises(RuntimeError, match=r"shape \[8, 64\], this layer \[64, 64\]"):
        other[0].load_state_dict(NF4Linear(linear(64, 8)).state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key.*extra"):
        other.load_state_dict({**state, "extra": torch.ones(1)})


def quantized_by_transformers(model, folder, **settings):
    from transformers import BitsAndBytesConfig

    model.save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                bnb_4bit_compute_dtype=model.dtype, **settings)
    return make_safe(type(model).from_pretrained(folder, quantization_config=config, dtype=model.dtype))


def test_files_of_transformers_load_here_and_ours_there(small_model, small_inputs, tmp_path):
    pytest.importorskip("bitsandbytes")
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    original, inputs = small_model("llama", hidden=64), small_inputs("llama")
    other = quantized_by_transformers(original, tmp_path / "dense")
    other.save_pretrained(tmp_path / "quantized")
    logits = other(**inputs).logits
    ours = quantize_model(copy.deepcopy(original))
    assert torch.equal(ours(**inputs).logits, logits)

    fresh = quantize_model(small_model("llama", hidden=64, seed=5))
    assert not torch.equal(fresh(**inputs).logits, logits)
    state = other.state_dict()
    assert set(state) == set(fresh.state_dict())
    fresh.load_state_dict(state)
    assert torch.equal(fresh(**inputs).logits, logits)

    another = quantize_model(small_model("llama", hidden=64, seed=7))
    expected = another(**inputs).logits
    tensors = {key: value.clone() for key, value in another.state_dict().items() if key != "lm_head.weight"}
    save_file(tensors, tmp_path / "quantized" / "model.safetensors", metadata={"format": "pt"})
    back = make_safe(LlamaForCausalLM.from_pretrained(tmp_path / "quantized"))
    assert torch.equal(back(**inputs).logits, expected)


# ------------------------------------------------------------------------------------------------ a whole model

@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_layers_as_transformers(family, tied, small_model, tmp_path):
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear4bit

    model = small_model(family, tied=tied, layers=2)
    other = quantized_by_transformers(model, tmp_path)
    expected = {name for name, module in other.named_modules() if isinstance(module, Linear4bit)}
    assert set(quantizable(model)) == expected and expected
    ours = quantize_model(model)
    assert ours is model
    assert {name for name, module in ours.named_modules() if isinstance(module, NF4Linear)} == expected
    assert not any("lm_head" in name or "embed" in name for name in expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_models_compute_what_transformers_and_bitsandbytes_do(family, small_model, small_inputs, tmp_path):
    pytest.importorskip("bitsandbytes")
    model, inputs = small_model(family, layers=2), small_inputs(family)
    dense = model(**inputs).logits
    other = quantized_by_transformers(model, tmp_path).eval()
    logits = quantize_model(model)(**inputs).logits
    assert relative(logits, other(**inputs).logits) < 1e-6
    assert 1e-4 < relative(logits, dense) < 0.5


def test_further_names_can_be_skipped(small_model):
    model = small_model("llama", layers=2)
    every = set(quantizable(model))
    assert every - set(quantizable(model, ["q_proj"])) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    assert every - set(quantizable(model, ["model.layers.1"])) == {n for n in every if n.startswith("model.layers.1.")}
    assert every - set(quantizable(model, [r"model\.layers\.\d+\.mlp"])) == {n for n in every if ".mlp." in n}
    assert "lm_head" not in every


def test_a_classifiers_head_stays(tmp_path):
    import transformers as tf

    config = tf.BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                           vocab_size=61, max_position_embeddings=64, num_labels=3)
    model = tf.BertForSequenceClassification(config).eval()
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear4bit

    other = quantized_by_transformers(model, tmp_path)
    expected = {name for name, module in other.named_modules() if isinstance(module, Linear4bit)}
    assert set(quantizable(model)) == expected


def test_each_weight_is_freed_as_it_goes(monkeypatch):
    model = nn.Sequential(*[linear(64, 64, seed=i) for i in range(6)])
    weights = [weakref.ref(layer.weight) for layer in model]
    alive = []
    real = qlora.NF4Linear

    def counting(*arguments):
        alive.append(sum(weight() is not None for weight in weights))
        return real(*arguments)

    monkeypatch.setattr(qlora, "NF4Linear", counting)
    quantize_model(model)
    assert alive == [6, 5, 4, 3, 2, 1] and not any(w() is not None for w in weights)


def test_layers_in_two_places_and_tied_weights():
    shared = linear(64, 64)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": linear(64, 64, seed=1)})
    quantize_model(model)
    assert model["a"] is model["b"] and isinstance(model["a"], NF4Linear)
    embedding, head = nn.Embedding(50, 64), nn.Linear(64, 50, bias=False)
    head.weight = embedding.weight
    model = quantize_model(nn.ModuleDict({"embedding": embedding, "body": linear(64, 64), "head": head}))
    assert model["head"] is head and isinstance(model["body"], NF4Linear)


def test_twice_is_once_and_what_is_refused(small_model):
    model = quantize_model(small_model("llama", layers=1))
    before = [module for module in model.modules()]
    quantize_model(model)
    assert all(a is b for a, b in zip(before, model.modules()))
    with pytest.raises(ValueError, match="has no linear layer to quantize"):
        quantize_model(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match=r"besides those that skip=\['0'\]"):
        quantize_model(nn.Sequential(linear()), skip=["0"])
    with pytest.raises(TypeError, match="model is a linear layer itself"):
        quantize_model(linear())
    with pytest.raises(TypeError, match="model must be a torch module; got str"):
        quantize_model("llama")
    with pytest.raises(TypeError, match=r"skip=\['lm_head'\]"):
        quantize_model(small_model(layers=1), skip="lm_head")
    model = attach(small_model("llama", layers=1), LoRAConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="q_proj' has an adapter.*Quantize first, attach afterwards"):
        quantize_model(model)


def test_a_bar_is_shown_when_asked_for(capsys):
    quantize_model(nn.Sequential(linear(), linear(64, 64)), progress=True)
    assert "quantizing" in capsys.readouterr().err
    quantize_model(nn.Sequential(linear(), linear(64, 64)))
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------------ with LoRA on top

def randomize(model):
    """The same non-zero A and B in both, by sorted order of their names."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in sorted((name.replace("base_model.model.", ""), p)
                                  for name, p in model.named_parameters() if p.requires_grad):
        parameter.data = (torch.randn(parameter.shape, generator=generator) / 16).to(parameter.dtype)


def gradients(model, inputs):
    model.train()
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output.logits.detach(), {name.replace("base_model.model.", ""): p.grad.clone()
                                    for name, p in model.named_parameters() if p.requires_grad}


def peft_on(layer, r=4, alpha=8, **settings):
    """peft's LoRA on bitsandbytes' layer."""
    peft = pytest.importorskip("peft")
    model = nn.Sequential(layer)
    model.is_loaded_in_4bit = True                               # as transformers marks it
    config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False, **settings)
    model = peft.get_peft_model(model, config)
    assert type(model.base_model.model[0]).__name__ == "Linear4bit"
    return model.base_model.model[0].train()


@settings(max_examples=25, deadline=None)
@given(d_in=st.integers(1, 12).map(lambda n: 16 * n), d_out=st.integers(4, 40), r=st.integers(1, 4),
       double=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
       tokens=st.sampled_from([1, 7, 64]))
def test_one_layer_is_peft_and_bitsandbytes(d_in, d_out, r, double, dtype, tokens):
    base = linear(d_in, d_out, True, dtype)
    other = peft_on(theirs(base, double), r)
    ours = LoRALinear(NF4Linear(base, double_quant=double), r=r, alpha=8)
    for key in ("lora_A", "lora_B"):
        getattr(ours, key)["default"].weight.data.copy_(getattr(other, key)["default"].weight)
    x, direction = torch.randn(tokens, d_in).to(dtype), torch.randn(tokens, d_out).to(dtype)
    results = []
    for layer in (ours, other):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(direction)
        factors = [layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]
        results.append((y.detach(), leaf.grad, *factors))
    # peft rounds W x, then the update, then their sum; we round the sum: one rounding of 2⁻⁸ or 2⁻¹¹ apart
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    for got, expected in zip(*results):
        assert got.dtype == expected.dtype and relative(got, expected) < tolerance


def qlora_twice(dtype, hidden, small_model, folder):
    """(our model, peft's on bitsandbytes) with the same weights and adapters."""
    peft = pytest.importorskip("peft")
    model = small_model("llama", dtype, hidden=hidden, layers=2)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    other = quantized_by_transformers(model, folder)
    other = peft.get_peft_model(other, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    ours = attach(quantize_model(model), LoRAConfig(r=4, alpha=8, target_modules=targets))
    assert count_parameters(ours) == other.get_nb_trainable_parameters()
    randomize(other)
    randomize(ours)
    return ours, other


@pytest.mark.parametrize("hidden", [32, 64])
def test_a_whole_model_is_peft_and_bitsandbytes(hidden, small_model, small_inputs, tmp_path):
    """Width 32 is one that bitsandbytes dequantizes wrongly on some processors, and `make_safe` cures."""
    ours, other = qlora_twice("float32", hidden, small_model, tmp_path)
    logits, found = gradients(ours, small_inputs("llama"))
    their_logits, expected = gradients(other, small_inputs("llama"))
    assert set(found) == set(expected) and len(found) == 2 * 7 * 2
    assert relative(logits, their_logits) < 1e-6
    for name in expected:
        assert found[name].any() and relative(found[name], expected[name]) < 2e-6, name


def test_a_whole_model_in_bfloat16_is_as_near_to_float32_as_theirs(small_model, small_inputs, tmp_path):
    ours, other = qlora_twice("bfloat16", 64, small_model, tmp_path)
    inputs = small_inputs("llama")
    logits, found = gradients(ours, inputs)
    their_logits, theirs_found = gradients(other, inputs)
    exact_logits, exact = gradients(ours.float(), inputs)        # the same codes, computed in float32
    assert relative(logits, exact_logits) < 0.01 and relative(their_logits, exact_logits) < 0.01

    def joined(some):
        return torch.cat([some[name].flatten() for name in sorted(exact)])

    assert relative(joined(found), joined(exact)) < 0.012 and relative(joined(theirs_found), joined(exact)) < 0.012
    assert relative(logits, their_logits) < 0.01 and relative(joined(found), joined(theirs_found)) < 0.015


def test_qlora_is_lora_on_the_dequantized_weight(small_model, small_inputs):
    """torchtune's test of the same name."""
    quantized = quantize_model(small_model("llama", hidden=64, layers=2))
    dense = copy.deepcopy(quantized)
    for name, layer in list(dense.named_modules()):
        if isinstance(layer, NF4Linear):
            dense.set_submodule(name, layer.to_linear())
    config = LoRAConfig(r=4, alpha=8, target_modules="all-linear")
    inputs = small_inputs("llama")
    results = []
    for model in (attach(quantized, config), attach(dense, config)):
        randomize(model)
        results.append(gradients(model, inputs))
    (logits, found), (dense_logits, expected) = results
    assert relative(logits, dense_logits) < 1e-6 and set(found) == set(expected)
    assert all(relative(found[name], expected[name]) < 2e-6 for name in expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_learns_detaches_and_generates(family, small_model, small_inputs):
    model = quantize_model(small_model(family, layers=2))
    inputs = small_inputs(family)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():                                        # with gradients, attention may take another kernel
        logits = model(**inputs).logits
    attach(model, LoRAConfig(r=4, target_modules="all-linear"))
    assert all("lora_" in name for name in trainable(model))
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model.train()(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    with disabled(model), torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)
    if family != "bert":
        out = model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False)
        assert out.shape[1] >= 3
    detach(model)
    after = model.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[k], v) for k, v in before.items())
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)


def test_transformers_checkpointing(small_model, small_inputs):
    model = quantize_model(small_model("llama", hidden=64, layers=2))
    attach(model, LoRAConfig(r=4, target_modules="all-linear"))
    randomize(model)
    inputs = small_inputs("llama")
    logits, expected = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    got, found = gradients(model, inputs)
    assert torch.equal(got, logits) and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_loaded_layer_is_a_linear_layer_to_a_process_that_imported_nothing_else(tmp_path):
    torch.save(nn.Sequential(NF4Linear(linear(64, 64))), tmp_path / "model.pt")
    code = ("import sys, torch; model = torch.load(sys.argv[1], weights_only=False); from pefttools.targets import "
            "is_linear; print(is_linear(model[0]), 'pefttools.qlora' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt"], capture_output=True, text=True,
                          check=True)
    assert done.stdout.split() == ["True", "False"]


def test_merging_into_codes_is_refused():
    layer = LoRALinear(NF4Linear(linear()), r=2, alpha=2)
    with pytest.raises(TypeError, match="quantized"):
        layer.merge()


def test_importing_it_imports_nothing_heavy():
    code = "import sys, pefttools.qlora; print(sorted({'bitsandbytes', 'peft', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
