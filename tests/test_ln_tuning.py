"""pefttools.ln_tuning against peft's LNTuningConfig: six families, files both ways, merging as swapping."""
from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pefttools.checkpoint import load_adapter, save_adapter
from pefttools.inject import (adapter_parameters, attach, count_parameters, delete_adapter, detach, disabled, merge,
                              set_adapter, trainable, unmerge)
from pefttools.ln_tuning import TARGETS, LNTuningConfig, LNTuningLayer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
SIX = ("llama", "qwen2", "gpt2", "opt", "bert", "t5")
NAMED = {"opt": ["self_attn_layer_norm", "final_layer_norm"], "bert": ["LayerNorm"]}     # peft has no row for these


def config(family):
    return LNTuningConfig(NAMED.get(family))


def stir(model, name=None, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def theirs_of(model, family, ours):
    from peft import LNTuningConfig as Theirs
    from peft import get_peft_model

    peft = get_peft_model(model, Theirs(target_modules=NAMED.get(family))).eval()
    state = {f"base_model.model.{k}": v for k, v in ours.state_dict().items()}
    assert set(state) == set(peft.state_dict())
    peft.load_state_dict(state)
    return peft


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", SIX)
def test_model_equals_pefts(family, dtype, small_model, small_inputs):
    inputs = small_inputs(family)
    base = logits(small_model(family, dtype), inputs)
    model = attach(small_model(family, dtype), config(family))
    assert torch.equal(logits(model, inputs), base)
    stir(model)
    peft = theirs_of(small_model(family, dtype), family, model)
    assert count_parameters(model) == peft.get_nb_trainable_parameters()
    assert torch.equal(logits(model, inputs), logits(peft, inputs)) and not torch.equal(logits(model, inputs), base)
    for each in (model, peft):
        each(**inputs).loss.backward()
    ours = {f"base_model.model.{name}": p.grad for name, p in trainable(model).items()}
    expected = {name: p.grad for name, p in peft.named_parameters() if p.requires_grad}
    assert set(ours) == set(expected) and all(torch.equal(ours[name], grad) for name, grad in expected.items())
    # OPT never calls a layer's copy where it does not exist; every norm that was wrapped has learned something
    assert all(grad is not None and grad.any() for grad in ours.values())

    with disabled(model):
        assert torch.equal(logits(model, inputs), base)
    after = logits(model, inputs)
    merge(model)
    assert torch.equal(logits(model, inputs), after)                      # the same norm: exact
    peft.merge_adapter()
    assert torch.equal(logits(peft, inputs), after)
    unmerge(model)
    assert torch.equal(logits(model, inputs), after)
    merge(model)
    detach(model)
    assert torch.equal(logits(model, inputs), base)


@pytest.mark.parametrize("family", SIX)
def test_files_load_in_peft_and_back(family, small_model, small_inputs, tmp_path):
    from peft import PeftModel

    inputs = small_inputs(family)
    model = stir(attach(small_model(family), config(family)))
    save_adapter(model, tmp_path / "ours")
    peft = PeftModel.from_pretrained(small_model(family), str(tmp_path / "ours")).eval()
    assert torch.equal(logits(peft, inputs), logits(model, inputs))
    peft.save_pretrained(str(tmp_path / "theirs"))
    back = load_adapter(small_model(family), tmp_path / "theirs")
    assert torch.equal(logits(back, inputs), logits(model, inputs))
    merge(model)
    save_adapter(model, tmp_path / "merged")                              # what is trained, not the base's
    assert torch.equal(logits(load_adapter(small_model(family), tmp_path / "merged"), inputs), logits(back, inputs))


def test_default_layers_are_pefts_and_its_row_with_other_modules_is_left_out():
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING as theirs

    assert {k: list(v) for k, v in TARGETS.items()} == {k: v for k, v in theirs.items() if k != "llava"}


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.LayerNorm(6, bias=False), nn.RMSNorm(6)])
def test_layer(norm):
    norm = norm.double()
    layer = LNTuningLayer(norm)
    layer.add("a")
    layer.active = {"a": 1.0}
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.equal(layer(x), norm(x))
    names = list(layer.adapter_parameters())
    assert names == [f"ln_tuning_layers.a.{key}" for key, _ in norm.named_parameters()]
    values = [torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in names]
    assert torch.autograd.gradcheck(
        lambda x, *v: torch.func.functional_call(layer, dict(zip(names, v)), x), (x, *values))
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == set(names)
    with torch.no_grad():
        layer.ln_tuning_layers["a"].weight.fill_(3.0)
    before = {key: p.detach().clone() for key, p in norm.named_parameters()}
    y = layer(x)
    layer.merge()
    layer.merge()
    assert torch.equal(layer(x), y) and torch.equal(norm(x), y)
    with torch.no_grad():                                                 # trained on while merged, the base stays put
        layer.ln_tuning_layers["a"].weight.fill_(9.0)
    assert torch.equal(norm(x), y)
    layer.unmerge()
    assert all(torch.equal(p, before[key]) for key, p in norm.named_parameters())
    assert torch.equal(layer(x[:0]), norm(x[:0])) and layer(x[:0]).shape == (0, 6)


def test_several_switch_and_refuse_to_act_together(small_model, small_inputs):
    inputs = small_inputs()
    model = stir(attach(small_model(), LNTuningConfig()), seed=1)
    first = logits(model, inputs)
    stir(attach(model, LNTuningConfig(["norm"]), name="b"), "b", seed=2)
    assert torch.equal(logits(model, inputs), first)
    set_adapter(model, "b")
    other = stir(attach(small_model(), LNTuningConfig(["norm"]), name="b"), "b", seed=2)
    assert torch.equal(logits(model, inputs), logits(other, inputs))
    assert torch.equal(logits(copy.deepcopy(model), inputs), logits(other, inputs))
    for names in (["default", "b"], {"b": 0.5}):
        with pytest.raises(ValueError, match="a norm has one γ at a time"):
            set_adapter(model, names)
    with pytest.raises(ValueError, match="one γ at a time"):
        set_adapter(model, ["default", "b"], stacked=True)
    assert torch.equal(logits(model, inputs), logits(other, inputs))
    delete_adapter(model, "default")
    assert torch.equal(logits(model, inputs), logits(other, inputs))


def test_one_layer_only(small_model):
    model = attach(small_model(), LNTuningConfig(["input_layernorm"], layers_to_transform=[1]))
    assert list(trainable(model)) == ["model.layers.1.input_layernorm.ln_tuning_layers.default.weight"]


def test_only_norms(small_model):
    with pytest.raises(TypeError, match=r"this is a Linear with weight \[32, 32\], and layer-norm tuning is for norm"):
        attach(small_model(), LNTuningConfig(["q_proj"]))
    with pytest.raises(TypeError, match="with no parameters"):
        LNTuningLayer(nn.LayerNorm(4, elementwise_affine=False))
    with pytest.raises(ValueError, match="target_modules must be given: layer-norm tuning has no customary layers"):
        attach(small_model("bert"), LNTuningConfig())


def test_the_number_in_the_docstring():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                                             vocab_size=128256, num_attention_heads=32, num_key_value_heads=8,
                                             tie_word_embeddings=True))
    attach(model, LNTuningConfig())
    trains, total = count_parameters(model)
    assert trains == 67_584 and round(100 * trains / (total - trains), 3) == 0.005
