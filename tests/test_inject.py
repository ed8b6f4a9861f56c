"""Attach, detach, disabled, merge: on a small Llama, against peft, and with wrong arguments."""
from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from pefttools.inject import (adapter_layers, adapter_parameters, attach, attached, count_parameters, detach, disabled,
                              merge, trainable, unmerge)
from pefttools.layer import AdapterLayer
from pefttools.lora import LoRAConfig, LoRALinear
from pefttools.targets import find_targets

IDS = torch.arange(24).reshape(2, 12) % 61
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices this small are slower on several threads, and far slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(tied=True, dtype=torch.float32, seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=61, tie_word_embeddings=tied, max_position_embeddings=64)
    return LlamaForCausalLM(config).to(dtype).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def stir(model, std=0.2):
    """As after training: every adapter parameter non-zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter += std * torch.randn(parameter.shape, generator=generator)
    return model


def fingerprint(model):
    """What a model is: its modules, and every tensor bit by bit, with the objects that hold them."""
    return ([(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)],
            [(name, id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters(remove_duplicate=False)],
            {name: tensor.clone() for name, tensor in model.state_dict().items()}, set(vars(model)))


def same(before, after):
    return (before[0] == after[0] and before[1] == after[1] and before[3] == after[3]
            and before[2].keys() == after[2].keys()
            and all(torch.equal(before[2][name], after[2][name]) for name in before[2]))


# ------------------------------------------------------------------------------------------------ in and out

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merged", [False, True])
def test_detach_leaves_the_model_bit_identical(dtype, merged):
    model = llama(dtype=dtype)
    model.model.norm.weight.requires_grad_(False)       # one parameter was frozen before, and must be so afterwards
    before, first = fingerprint(model), logits(model)
    stir(attach(model, LoRAConfig(r=4, target_modules="all-linear")))
    assert not torch.equal(logits(model), first)
    if merged:
        merge(model)
    assert detach(model) is model
    assert same(before, fingerprint(model)) and torch.equal(logits(model), first)
    assert detach(model) is model                       # nothing attached, nothing to do


def test_attach_starts_as_the_identity_freezes_the_base_and_spares_the_global_generator():
    model = llama()
    first, state = logits(model), torch.get_rng_state()
    assert attach(model, LoRAConfig(r=4, target_modules=["q_proj", "down_proj"])) is model
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(logits(model), first)
    expected = {f"model.layers.{i}.{part}.lora_{m}.default.weight"
                for i in range(3) for part in ("self_attn.q_proj", "mlp.down_proj") for m in "AB"}
    assert set(trainable(model)) == set(adapter_parameters(model)) == expected
    assert attached(model).names == [name for name, _ in adapter_layers(model)]
    assert type(model.model.layers[0].self_attn.q_proj) is LoRALinear


def test_seed_decides_the_adapters():
    def a_of(seed):
        return adapter_parameters(attach(llama(), LoRAConfig(r=4), seed))

    first, again, other = a_of(0), a_of(0), a_of(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)
    a = [value for name, value in first.items() if "q_proj.lora_A" in name]
    assert not torch.equal(a[0], a[1])                  # one stream through the layers, not one seed for each


def test_training_changes_the_adapters_and_nothing_else():
    model = attach(llama(), LoRAConfig(r=4, target_modules="all-linear")).train()
    base = {name: p.detach().clone() for name, p in model.named_parameters() if name not in trainable(model)}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)


def test_trainable_and_counts_without_adapters_are_the_whole_model():
    model = llama()
    assert set(trainable(model)) == {name for name, _ in model.named_parameters()}
    assert count_parameters(model) == (model.num_parameters(), model.num_parameters())


def test_a_copy_of_an_attached_model_detaches_too():
    model = llama()
    first = logits(model)
    twin = copy.deepcopy(stir(attach(model, LoRAConfig(r=2))))
    assert torch.equal(logits(detach(twin)), first)
    assert not torch.equal(logits(model), first)        # the original keeps its adapters


# ------------------------------------------------------------------------------------------------ against peft

TARGETS = [("q_proj", "v_proj"), ATTENTION, ("gate_proj", "up_proj", "down_proj"), "all-linear", r".*\.[02]\..*_proj",
           ("self_attn.k_proj",), ("model.layers.1.mlp.up_proj",), ("lm_head", "q_proj")]


def pefts(model, **settings):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))


def strip(name):
    return name.removeprefix("base_model.model.")


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_the_same_layers_names_and_counts_as_peft(targets, tied):
    model = attach(llama(tied), LoRAConfig(r=4, target_modules=targets))
    theirs = pefts(llama(tied), r=4, target_modules=targets if isinstance(targets, str) else list(targets))
    assert [n for n, _ in model.named_parameters()] == [strip(n) for n, _ in theirs.named_parameters()]
    assert set(trainable(model)) == {strip(n) for n, p in theirs.named_parameters() if p.requires_grad}
    assert count_parameters(model) == theirs.get_nb_trainable_parameters()
    assert sum(p.numel() for p in trainable(model).values()) == count_parameters(model)[0]


@pytest.mark.parametrize("layers", [0, [0, 2], (1,), []])
def test_layers_to_transform_as_peft(layers):
    model = attach(llama(), LoRAConfig(r=4, layers_to_transform=layers))
    theirs = pefts(llama(), r=4, target_modules=["q_proj", "v_proj"],
                   layers_to_transform=layers if isinstance(layers, int) else list(layers))
    assert set(trainable(model)) == {strip(n) for n, p in theirs.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rslora", [False, True])
def test_logits_and_gradients_equal_pefts(dtype, rslora):
    model = stir(attach(llama(dtype=dtype), LoRAConfig(r=4, alpha=12, rslora=rslora, target_modules="all-linear")))
    theirs = pefts(llama(dtype=dtype), r=4, lora_alpha=12, use_rslora=rslora, target_modules="all-linear")
    theirs.load_state_dict({"base_model.model." + k: v for k, v in model.state_dict().items()})
    theirs.eval()
    exact = copy.deepcopy(model).double()
    for each in (model, theirs, exact):
        each(IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-6, atol=1e-6)
    gradients = {strip(n): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    close = 5e-6 if dtype == torch.float32 else 5e-2
    ours_off = theirs_off = 0.0
    for name, parameter in trainable(model).items():
        assert parameter.grad.dtype == torch.float32
        right = trainable(exact)[name].grad
        # Sums in another order round otherwise, and each layer below rounds that again: nearer to each other than
        # either is to the truth in float64, and ours no further from it than peft's.
        assert (parameter.grad - gradients[name]).norm() <= close * right.norm(), name
        ours_off += ((parameter.grad - right).norm() / right.norm()).item()
        theirs_off += ((gradients[name] - right).norm() / right.norm()).item()
    assert ours_off <= 1.1 * theirs_off


def test_find_targets_changes_nothing_and_skips_only_the_output_head():
    model = llama()
    before = fingerprint(model)
    names = list(find_targets(model, LoRAConfig(target_modules="ALL-LINEAR")))
    assert len(names) == 3 * 7 and "lm_head" not in names and same(before, fingerprint(model))
    headless = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))    # no output head by convention, as in peft
    assert list(find_targets(headless, LoRAConfig(r=2, target_modules="all-linear"))) == ["0", "2"]
    assert isinstance(attach(headless, LoRAConfig(r=2, target_modules=["2"]))[2], LoRALinear)


# ------------------------------------------------------------------------------------------------ disabled, merged

@pytest.mark.parametrize("merged", [False, True])
def test_disabled_is_the_base_model_and_ends_with_an_exception_too(merged):
    model = llama()
    first = logits(model)
    stir(attach(model, LoRAConfig(r=4)))
    if merged:
        merge(model)
    adapted = logits(model)
    with disabled(model) as inner:
        assert inner is model and torch.equal(logits(model), first)
        with disabled(model):
            assert torch.equal(logits(model), first)
        assert torch.equal(logits(model), first)
    assert torch.equal(logits(model), adapted)
    with pytest.raises(ZeroDivisionError):
        with disabled(model):
            1 / 0
    assert torch.equal(logits(model), adapted)
    assert all(layer.merged is merged and layer.enabled for _, layer in adapter_layers(model))


def test_merge_keeps_the_outputs_and_is_idempotent():
    model = stir(attach(llama(), LoRAConfig(r=4, target_modules="all-linear")))
    adapted = logits(model)
    once = logits(merge(model))
    assert torch.equal(logits(merge(model)), once)
    torch.testing.assert_close(once, adapted, rtol=1e-6, atol=1e-6)
    assert torch.equal(logits(unmerge(unmerge(model))), adapted)


def test_merge_refuses_a_tied_head_and_leaves_the_model_as_it_was():
    model = stir(attach(llama(tied=True), LoRAConfig(r=4, target_modules=["q_proj", "lm_head"])))
    adapted = logits(model)
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight and lm_head.weight are one tied tensor.*Leave "
                                         r"'lm_head' out of target_modules"):
        merge(model)
    assert torch.equal(logits(model), adapted) and not any(layer.merged for _, layer in adapter_layers(model))
    untied = stir(attach(llama(tied=False), LoRAConfig(r=4, target_modules=["q_proj", "lm_head"])))
    adapted = logits(untied)
    torch.testing.assert_close(logits(merge(untied)), adapted, rtol=1e-6, atol=1e-6)


def test_merge_is_undone_when_a_later_layer_cannot_be_merged():
    model = stir(attach(llama(), LoRAConfig(r=4)))
    last = list(adapter_layers(model))[-1][1]
    with torch.no_grad():
        last.lora_B["default"].weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"model\.layers\.2\.self_attn\.v_proj: merge: .*NaN or infinite"):
        merge(model)
    assert not any(layer.merged for _, layer in adapter_layers(model))


def test_merge_in_a_disabled_model_is_refused():
    model = attach(llama(), LoRAConfig(r=4))
    with disabled(model), pytest.raises(ValueError, match="is disabled. Merge outside of `with disabled"):
        merge(model)


@pytest.mark.parametrize("what", [merge, unmerge, lambda model: disabled(model).__enter__()])
def test_without_adapters_there_is_nothing_to_merge_or_disable(what):
    with pytest.raises(ValueError, match=r"this model has no adapters. Call attach\(model, config\) first"):
        what(llama())


# ------------------------------------------------------------------------------------------------ wrong arguments

NAMES = "named q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head"


@pytest.mark.parametrize("settings, error, message", [
    ({"target_modules": ["q_prj"]}, ValueError,
     f"no module is named 'q_prj'.*{NAMES}; the nearest to 'q_prj' is 'q_proj'"),
    ({"target_modules": ["q_proj", "c_attn"]}, ValueError, f"no module is named 'c_attn'.*{NAMES}"),
    ({"target_modules": ["proj"]}, ValueError, "no module is named 'proj'"),      # a whole part of the name, not its end
    ({"target_modules": []}, ValueError, rf"must name at least one layer; got \[\].*{NAMES}"),
    ({"target_modules": [""]}, ValueError, "must name at least one layer"),
    ({"target_modules": "q_proj"}, ValueError,
     r"a regular expression for the whole name; did you mean the list \['q_proj'\]"),
    ({"target_modules": ".*qq.*"}, ValueError, f"selects no module.*{NAMES}"),
    ({"target_modules": "(q"}, ValueError, r"is not a regular expression.*give a list: \[\"q_proj\", \"v_proj\"\]"),
    ({"target_modules": ["self_attn"]}, TypeError, f"'model.layers.0.self_attn': this is a LlamaAttention.*{NAMES}"),
    ({"target_modules": ["input_layernorm"]}, TypeError, "'model.layers.0.input_layernorm': this is a LlamaRMSNorm"),
    ({"target_modules": r".*\.mlp.*"}, TypeError, r"'model\.layers\.0\.mlp': this is a LlamaMLP"),
    ({"target_modules": ["k_proj"], "r": 17}, ValueError,
     r"'model\.layers\.0\.self_attn\.k_proj': r = 17 is more than min\(d_in=32, d_out=16\) = 16.*could not express"),
    ({"layers_to_transform": [1, 7]}, ValueError, r"no layer 7 with such a module; the layers are \[0, 1, 2\]"),
    ({"layers_to_transform": -1}, ValueError, "no layer -1"),
    ({"layers_to_transform": 1, "target_modules": "all-linear"}, ValueError, "works with a list of names"),
])
def test_wrong_targets_say_what_exists_and_change_nothing(settings, error, message):
    model = llama()
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        attach(model, LoRAConfig(**settings))
    assert same(before, fingerprint(model))


def test_names_that_select_nothing_are_ignored_as_in_peft_when_not_strict():
    config = LoRAConfig(r=4, target_modules=["q_proj", "c_attn"])
    assert len(trainable(attach(llama(), config, strict=False))) == 3 * 2
    with pytest.raises(ValueError, match="no module is named 'c_attn'"):
        attach(llama(), replace(config, target_modules=["c_attn"]), strict=False)


def test_attaching_twice_is_refused():
    model = stir(attach(llama(), LoRAConfig(r=4)))
    adapted = logits(model)
    with pytest.raises(ValueError, match=r"has adapters already, one of them called 'default'. Call detach\(model\) first"):
        attach(model, LoRAConfig(r=2, target_modules=["k_proj"]))
    assert torch.equal(logits(model), adapted)
    attach(detach(model), LoRAConfig(r=2, target_modules=["k_proj"]))


def test_a_part_of_an_attached_model_is_not_the_model():
    model = attach(llama(), LoRAConfig(r=4))
    with pytest.raises(ValueError, match="pass the same model"):
        detach(model.model)
    assert len(list(adapter_layers(model))) == 6


def test_model_and_config_of_the_wrong_kind():
    from peft import LoraConfig

    with pytest.raises(TypeError, match="model must be a torch module; got str"):
        attach("tiny", LoRAConfig())
    for config in ({"r": 8}, LoRAConfig, LoraConfig(target_modules=["q_proj"])):
        with pytest.raises(TypeError, match="config must be a configuration of pefttools"):
            attach(llama(), config)


def test_one_module_under_two_names_is_refused():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"one": shared, "two": shared})
    with pytest.raises(ValueError, match="one module that the model holds under several names: one, two"):
        attach(model, LoRAConfig(r=2, target_modules=["one"]))


# ------------------------------------------------------------------------------------------------ the protocol

class Scaled(AdapterLayer):
    """Another method: y = g · base(x), one trained number a layer."""

    holds = ("gain",)

    def __init__(self, base):
        super().__init__(base)
        self.gain = nn.ParameterDict()

    def add(self, name, config, generator=None):
        self.gain[name] = nn.Parameter(torch.ones(1))

    def forward(self, x):
        y = self.base_layer(x)
        for name in self.active if self.enabled else ():
            y = y * self.gain[name]
        return y


@dataclass(frozen=True)
class ScaledConfig:
    target_modules: tuple[str, ...] = ("q_proj",)
    layers_to_transform: None = None

    def shapes(self, base):
        return {"gain": (1,)}

    def build(self, base, generator=None, name="default"):
        layer = Scaled(base)
        layer.add(name, self, generator)
        layer.active = {name: 1.0}
        return layer


def test_another_method_needs_only_the_protocol():
    model = llama()
    before, first = fingerprint(model), logits(model)
    stir(attach(model, ScaledConfig()))
    assert set(trainable(model)) == {f"model.layers.{i}.self_attn.q_proj.gain.default" for i in range(3)}
    assert count_parameters(model)[0] == 3 and not torch.equal(logits(model), first)
    with disabled(model):
        assert torch.equal(logits(model), first)
    with pytest.raises(TypeError, match=r"model\.layers\.0\.self_attn\.q_proj: Scaled computes something .* cannot be merged"):
        merge(model)
    assert same(before, fingerprint(detach(model)))


def test_a_failure_while_building_restores_the_model():
    @dataclass(frozen=True)
    class Failing(ScaledConfig):
        def build(self, base, generator=None, name="default"):
            base.requires_grad_(False)
            raise MemoryError("no memory")

    model = llama()
    before = fingerprint(model)
    with pytest.raises(MemoryError):
        attach(model, Failing())
    assert same(before, fingerprint(model))


def test_counts_two_codes_in_each_byte_of_a_4_bit_weight():
    class Params4bit(nn.Parameter):
        pass

    model = nn.Module()
    model.packed = Params4bit(torch.zeros(10, 1, dtype=torch.uint8), requires_grad=False)
    assert count_parameters(model) == (0, 20)


def test_without_target_modules_the_family_decides_and_an_unknown_one_is_asked_for():
    names = [name for name, _ in adapter_layers(attach(llama(), LoRAConfig(r=4, target_modules=None)))]
    assert {name.rsplit(".", 1)[-1] for name in names} == {"q_proj", "v_proj"} and len(names) == 6
    with pytest.raises(ValueError, match="target_modules must be given: .* a model without a configuration"):
        attach(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules=None))


def test_a_failure_in_a_second_adapter_leaves_the_first_as_it_was():
    model = stir(attach(llama(), ScaledConfig()))
    before, adapted = fingerprint(model), logits(model)
    calls = []
    add = Scaled.add

    def fail_at_the_third(self, name, config, generator=None):
        calls.append(name)
        if len(calls) == 3:
            raise MemoryError("no memory")
        add(self, name, config, generator)

    Scaled.add = fail_at_the_third
    try:
        with pytest.raises(MemoryError):
            attach(model, ScaledConfig(), name="second")
    finally:
        Scaled.add = add
    assert same(before, fingerprint(model)) and torch.equal(logits(model), adapted)
    assert list(attached(model).configs) == ["default"]


class Whole(Scaled):
    """A block, wrapped: its own layers can be wrapped as well."""

    def forward(self, *args, **kwargs):
        y = self.base_layer(*args, **kwargs)
        for name in self.active if self.enabled else ():
            y = y * self.gain[name]
        return y


def test_a_block_and_a_layer_inside_it():
    @dataclass(frozen=True)
    class Config(ScaledConfig):
        target_modules: tuple[str, ...] = ("mlp", "down_proj")

        def build(self, base, generator=None, name="default"):
            layer = (Scaled if isinstance(base, nn.Linear) else Whole)(base)
            layer.add(name, self, generator)
            layer.active = {name: 1.0}
            return layer

    model = llama()
    before, first = fingerprint(model), logits(model)
    stir(attach(model, Config()))
    assert count_parameters(model)[0] == 6 and not torch.equal(logits(model), first)
    attach(model, Config(), name="second")                        # the plain names are still those of the model
    assert count_parameters(model)[0] == 6 and len(adapter_parameters(model)) == 12
    detach(model)
    assert same(before, fingerprint(model)) and torch.equal(logits(model), first)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_changes_the_weight_refuses_a_tied_one(init):
    model = llama(tied=True)
    before = fingerprint(model)
    with pytest.raises(ValueError, match="attach: model.embed_tokens.weight and lm_head.weight are one tied tensor"):
        attach(model, LoRAConfig(r=4, target_modules=["q_proj", "lm_head"], init=init))
    assert same(before, fingerprint(model))
