"""Several adapters on one base: switched, added, weighted, deleted; on a small Llama, and against peft."""
from __future__ import annotations

import pytest
import torch

from pefttools.checkpoint import load_adapter, save_adapter
from pefttools.inject import (adapter_layers, adapter_parameters, attach, attached, delete_adapter, detach, disabled,
                              merge, set_adapter, trainable, unmerge)
from pefttools.lora import LoRAConfig

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(24).reshape(2, 12) % 61
FIRST = LoRAConfig(r=4, alpha=12)
SECOND = LoRAConfig(r=2, alpha=3, rslora=True, target_modules=["v_proj", "down_proj"])


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def stir(model, name, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def two(small_model):
    """A Llama with two trained adapters in layers that overlap."""
    model = stir(attach(small_model(), FIRST), "default", 7)
    return stir(attach(model, SECOND, seed=1, name="second"), "second", 8)


def alone(small_model, config, name, seed):
    return stir(attach(small_model(), config, seed=0 if name == "default" else 1, name=name), name, seed)


def test_a_second_adapter_waits_and_is_frozen(small_model, two):
    assert torch.equal(logits(two), logits(alone(small_model, FIRST, "default", 7)))
    assert list(attached(two).configs) == ["default", "second"] and attached(two).config == FIRST
    assert set(trainable(two)) == set(adapter_parameters(two, "default"))
    assert len(adapter_parameters(two)) == 2 * 6 + 2 * 6


def test_switched_it_is_the_model_with_that_adapter_alone(small_model, two):
    assert set_adapter(two, "second") is two
    assert torch.equal(logits(two), logits(alone(small_model, SECOND, "second", 8)))
    assert set(trainable(two)) == set(adapter_parameters(two, "second"))
    set_adapter(two, "default")
    assert torch.equal(logits(two), logits(alone(small_model, FIRST, "default", 7)))


def test_several_at_once_are_the_sum_of_their_updates_with_weights(small_model, two):
    base = small_model()
    with torch.no_grad():
        for name, weight in base.named_parameters():
            for adapter, factor in (("default", 0.7), ("second", -0.3)):
                layer = dict(adapter_layers(two)).get(name.removesuffix(".weight"))
                if layer is not None and adapter in layer.names:
                    a, b = (p for key, p in sorted(layer.adapter_parameters(adapter).items()))
                    scale = 12 / 4 if adapter == "default" else 3 / 2 ** 0.5
                    weight += factor * scale * b @ a
    set_adapter(two, {"default": 0.7, "second": -0.3})
    torch.testing.assert_close(logits(two), logits(base), rtol=1e-5, atol=1e-6)
    assert set(trainable(two)) == set(adapter_parameters(two))


@pytest.mark.filterwarnings("ignore")
def test_together_as_in_peft(small_model, two):
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(small_model(), LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj"]))
    theirs.add_adapter("second", LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=["v_proj", "down_proj"]))
    theirs.load_state_dict({"base_model.model." + k: v for k, v in two.state_dict().items()})
    theirs.eval()
    for names in ("default", "second", ["default", "second"]):
        theirs.base_model.set_adapter(names)
        set_adapter(two, names)
        assert torch.equal(logits(two), logits(theirs))
        assert set(trainable(two)) == {n.removeprefix("base_model.model.") for n, p in theirs.named_parameters()
                                       if p.requires_grad}


def test_merged_the_sum_is_in_the_weight(two):
    set_adapter(two, {"default": 0.5, "second": 2.0})
    adapted = logits(two)
    torch.testing.assert_close(logits(merge(two)), adapted, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"an adapter is merged into this model. Call unmerge\(model\) first"):
        set_adapter(two, "second")
    with pytest.raises(ValueError, match="merged"):
        attach(two, SECOND, name="third")
    assert torch.equal(logits(unmerge(two)), adapted)


def test_disabled_and_detached_is_the_base(small_model, two):
    first = logits(small_model())
    set_adapter(two, ["default", "second"])
    with disabled(two):
        assert torch.equal(logits(two), first)
    assert torch.equal(logits(detach(two)), first) and not hasattr(two, "_pefttools")


def test_deleted_it_leaves_no_trace(small_model, two):
    delete_adapter(two, "second")
    one = alone(small_model, FIRST, "default", 7)
    assert [n for n, _ in two.named_modules()] == [n for n, _ in one.named_modules()]
    assert torch.equal(logits(two), logits(one)) and list(attached(two).configs) == ["default"]
    attach(two, SECOND, name="second")


def test_files_of_one_of_several(small_model, two, tmp_path):
    set_adapter(two, "second")
    expected = logits(two)
    save_adapter(two, tmp_path / "acting")
    save_adapter(two, tmp_path / "first", name="default")
    assert torch.equal(logits(load_adapter(small_model(), tmp_path / "acting")), expected)
    again = load_adapter(load_adapter(small_model(), tmp_path / "first"), tmp_path / "acting", name="second")
    assert torch.equal(logits(again), logits(alone(small_model, FIRST, "default", 7)))
    assert torch.equal(logits(set_adapter(again, "second")), expected)
    set_adapter(two, ["default", "second"])
    with pytest.raises(ValueError, match="several adapters act .default, second.; say which one to save"):
        save_adapter(two, tmp_path / "both")
    with pytest.raises(ValueError, match="there is no adapter 'third'; this model has default, second"):
        save_adapter(two, tmp_path / "third", name="third")


@pytest.mark.parametrize("names, message", [
    ("third", "there is no adapter 'third'; this model has default, second"),
    ([], "name at least one adapter"),
    ({"default": float("nan")}, "the weight of 'default' must be a finite number; got nan"),
    ({"default": "1"}, "must be a finite number; got '1'"),
])
def test_wrong_names_and_weights_change_nothing(two, names, message):
    before = logits(two)
    with pytest.raises(ValueError, match=message):
        set_adapter(two, names)
    assert torch.equal(logits(two), before)


def test_lora_cannot_be_stacked(two):
    with pytest.raises(ValueError, match="stacked=True: the adapters of a LoRALinear act side by side"):
        set_adapter(two, ["default", "second"], stacked=True)


@pytest.mark.parametrize("name", ["", "a.b", "forward", "keys", 3])
def test_names_that_cannot_be_part_of_a_parameter_name(small_model, name):
    with pytest.raises(ValueError, match="name must be a word without dots"):
        attach(small_model(), FIRST, name=name)


def test_what_may_not_be_deleted(two):
    for name, message in (("third", "there is no adapter"), ("default", "acts. Call set_adapter.model, 'second'")):
        with pytest.raises(ValueError, match=message):
            delete_adapter(two, name)
    delete_adapter(two, "second")
    with pytest.raises(ValueError, match=r"is the only adapter. Call detach\(model\)"):
        delete_adapter(two, "default")


def test_a_taken_name(two):
    with pytest.raises(ValueError, match="one of them called 'second'"):
        attach(two, SECOND, name="second")
