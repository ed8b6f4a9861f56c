"""LoRA+: the parameter groups, against peft's optimizer."""
from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pefttools.inject import attach, trainable
from pefttools.lora import LoRAConfig
from pefttools.loraplus import loraplus_groups, loraplus_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")


def named(model, groups):
    """[({names}, lr, weight_decay)] with peft's prefix left out."""
    names = {id(p): name.removeprefix("base_model.model.") for name, p in model.named_parameters()}
    return [({names[id(p)] for p in group["params"]}, group["lr"], group["weight_decay"]) for group in groups]


def pefts(model, targets, unfreeze=(), **options):
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, **options))
    for name, parameter in model.named_parameters():
        if any(word in name and "lora" not in name for word in unfreeze):
            parameter.requires_grad_(True)
    return model, create_loraplus_optimizer(model, torch.optim.AdamW, lr=2e-4, loraplus_lr_ratio=8.0,
                                            loraplus_weight_decay=0.02, loraplus_lr_embedding=3e-6)


def ours(model, config, unfreeze=()):
    attach(model, config)
    for name, parameter in model.named_parameters():
        if any(word in name and "lora" not in name for word in unfreeze):
            parameter.requires_grad_(True)
    return model, loraplus_optimizer(model, lr=2e-4, ratio=8.0, weight_decay=0.02, lr_embedding=3e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family, targets, unfreeze", [
    ("llama", ["q_proj", "v_proj"], ()), ("llama", ["down_proj"], ("norm",)), ("gpt2", ["c_attn"], ("ln_1", "bias")),
    ("opt", ["q_proj", "fc1"], ("layer_norm", "bias")), ("t5", ["q", "wo"], ("layer_norm",)),
    ("bert", ["query"], ("bias",))])
def test_groups_equal_pefts(small_model, family, targets, unfreeze):
    model = small_model(family)
    a, theirs = pefts(copy.deepcopy(model), targets, unfreeze)
    b, mine = ours(model, LoRAConfig(r=4, target_modules=targets), unfreeze)
    assert named(b, mine.param_groups) == named(a, theirs.param_groups)
    assert [sorted(g) for g in mine.param_groups] == [sorted(g) for g in theirs.param_groups]


@pytest.mark.filterwarnings("ignore")
def test_groups_of_dora_equal_pefts_the_magnitude_learns_as_fast_as_B(small_model):
    from pefttools.dora import DoRAConfig

    model = small_model()
    a, theirs = pefts(copy.deepcopy(model), ["q_proj"], use_dora=True)
    b, mine = ours(model, DoRAConfig(r=4, target_modules=["q_proj"]))
    assert named(b, mine.param_groups) == named(a, theirs.param_groups)
    assert any("magnitude" in name for name in named(b, mine.param_groups)[2][0])


@pytest.mark.filterwarnings("ignore")
def test_groups_of_embeddings_equal_pefts(small_model):
    model = small_model(tied=False)
    a, theirs = pefts(copy.deepcopy(model), ["embed_tokens", "q_proj"])
    b, mine = ours(model, LoRAConfig(r=4, target_modules=["embed_tokens", "q_proj"]))
    assert named(b, mine.param_groups) == named(a, theirs.param_groups)
    assert len(named(b, mine.param_groups)[1][0]) == 2


@pytest.mark.filterwarnings("ignore")
def test_one_step_equals_pefts(small_model, small_inputs):
    model = small_model()
    a, theirs = pefts(copy.deepcopy(model), ["q_proj", "v_proj"])
    b, mine = ours(model, LoRAConfig(r=4, target_modules=["q_proj", "v_proj"]))
    values = {name.removeprefix("base_model.model."): p for name, p in a.named_parameters()}
    with torch.no_grad():
        for name, parameter in trainable(b).items():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
            values[name].copy_(parameter)
    for m, optimizer in ((a, theirs), (b, mine)):
        m(**small_inputs()).loss.backward()
        optimizer.step()
    for name, parameter in trainable(b).items():
        torch.testing.assert_close(parameter, values[name], rtol=1e-5, atol=1e-6)


def test_every_trainable_parameter_is_in_exactly_one_group(small_model):
    model = attach(small_model(), LoRAConfig(r=4, target_modules="all-linear"))
    listed = [id(p) for group in loraplus_groups(model, lr=1e-4) for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in trainable(model).values())
    rates = {name: group["lr"] for group in loraplus_groups(model, lr=1e-4) for p in group["params"]
             for name, q in trainable(model).items() if p is q}
    assert {rate for name, rate in rates.items() if "lora_A" in name} == {1e-4}
    assert {rate for name, rate in rates.items() if "lora_B" in name} == {1e-4 * 16}


@pytest.mark.parametrize("wrong, says", [
    ({"lr": 0}, "lr"), ({"lr": float("nan")}, "lr"), ({"lr": "1e-4"}, "lr"), ({"lr": 1e-4, "ratio": -1}, "ratio"),
    ({"lr": 1e-4, "weight_decay": -0.1}, "decay"), ({"lr": 1e-4, "lr_embedding": float("inf")}, "lr_embedding")])
def test_wrong_numbers_are_named(small_model, wrong, says):
    model = attach(small_model(), LoRAConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=says):
        loraplus_groups(model, **wrong)


def test_a_model_without_lora_is_refused():
    with pytest.raises(ValueError, match="attach"):
        loraplus_groups(nn.Linear(3, 3), lr=1e-4)
