"""Adapters combined into a new one, against peft's add_weighted_adapter, by the ΔW of every layer."""
from __future__ import annotations

import copy
import re

import pytest
import torch

from pefttools.attached import adapter_layers, adapter_parameters, attached, trainable
from pefttools.dora import DoRAConfig
from pefttools.inject import attach, detach, merge, set_adapter, unmerge
from pefttools.lora import LoRAConfig
from pefttools.lora_combine import add_weighted_adapter, combined

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

TARGETS = {"llama": ["q_proj", "down_proj", "embed_tokens"], "gpt2": ["c_attn", "wte"], "t5": ["q", "wo"]}


def both(small_model, family="llama", ranks=(4, 4), alphas=(8, 6), rslora=False):
    """(ours, peft's) with adapters "a" and "b" of equal values."""
    from peft import LoraConfig, get_peft_model

    ours, theirs = small_model(family, tied=False), small_model(family, tied=False)
    for name, r, alpha in zip("ab", ranks, alphas):
        attach(ours, LoRAConfig(r, alpha, rslora=rslora, target_modules=TARGETS[family]), name=name)
        config = LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora, target_modules=TARGETS[family])
        if name == "a":
            theirs = get_peft_model(theirs, config, adapter_name=name)
        else:
            theirs.add_adapter(name, config)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(ours).values():
            parameter.normal_(std=0.3, generator=g)
        state = theirs.state_dict()
        for key, value in ours.state_dict().items():
            state["base_model.model." + key].copy_(value)
    return ours, theirs


def deltas(model, name):
    return {path: layer.delta(name) for path, layer in adapter_layers(model) if name in layer.names}


def pefts(model, name):
    from peft.tuners.lora import LoraLayer

    layers = {path.removeprefix("base_model.model."): layer for path, layer in model.named_modules()
              if isinstance(layer, LoraLayer)}
    with torch.no_grad():      # ours is [d_out, d_in] (Conv1D: peft's is as the weight is stored)
        return {path: layer.get_delta_weight(name).T if getattr(layer, "fan_in_fan_out", False)
                and "embedding" not in type(layer).__name__.lower() else layer.get_delta_weight(name)
                for path, layer in layers.items()}


def equal(got, expected, tolerance=2e-6):
    assert got.keys() == expected.keys() and len(got) > 3
    for path in expected:
        scale = expected[path].abs().max().item()
        assert scale > 0
        torch.testing.assert_close(got[path], expected[path], rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -2.0)])
@pytest.mark.parametrize("kind, ranks, options", [
    ("svd", (4, 2), {}), ("svd", (3, 4), {"rank": 5}), ("cat", (4, 2), {}), ("linear", (4, 4), {}),
    ("magnitude_prune", (4, 4), {"density": 0.4}), ("ties", (4, 4), {"density": 0.6})])
def test_equals_pefts(kind, ranks, options, weights, family, small_model):
    ours, theirs = both(small_model, family, ranks)
    add_weighted_adapter(ours, ["a", "b"], weights, "new", kind, **options)
    theirs.base_model.add_weighted_adapter(["a", "b"], list(weights), "new", kind, svd_rank=options.get("rank"),
                                           density=options.get("density"))
    equal(deltas(ours, "new"), pefts(theirs, "new"), 1e-5 if kind == "svd" else 2e-6)
    assert attached(ours).configs["new"].r == theirs.peft_config["new"].r


@pytest.mark.parametrize("rslora", [False, True])
def test_cat_is_exactly_the_weighted_sum_and_set_adapter_says_the_same(rslora, small_model, small_inputs):
    ours, _ = both(small_model, ranks=(4, 2), rslora=rslora)
    logits = lambda: ours(**small_inputs()).logits.detach()  # noqa: E731
    set_adapter(ours, {"a": 0.7, "b": -0.4})
    expected = logits()
    add_weighted_adapter(ours, ["a", "b"], [0.7, -0.4], "new", "cat")
    assert torch.equal(logits(), expected)               # it does not act yet
    assert not any(".new" in name for name in trainable(ours))
    set_adapter(ours, "new")
    torch.testing.assert_close(logits(), expected, rtol=1e-5, atol=1e-5)
    assert all(".new" in name for name in trainable(ours))


def test_of_one_adapter_every_kind_is_a_scaled_copy(small_model):
    for kind in ("svd", "cat", "linear"):
        ours, _ = both(small_model)
        add_weighted_adapter(ours, ["a"], [-1.5], "negated", kind)
        equal(deltas(ours, "negated"), {path: -1.5 * delta for path, delta in deltas(ours, "a").items()})


def test_dare_keeps_a_share_of_the_entries_and_their_expectation(small_model):
    g = torch.Generator().manual_seed(0)
    A, B = torch.ones(4, 5000), torch.ones(3, 4)
    new_A, _ = combined([(A, B), (A, 0 * B)], [1.0, 1.0], "dare_linear", density=0.25, generator=g)
    assert set(new_A.unique().tolist()) == {0.0, 4.0, 8.0} and abs(new_A.mean() - 2) < 0.05
    ours, _ = both(small_model)
    for seed, name in ((0, "x"), (0, "y"), (1, "z")):
        add_weighted_adapter(ours, ["a", "b"], [1, 1], name, "dare_linear", density=0.5, seed=seed)
    x, y, z = (torch.cat([d.flatten() for d in deltas(ours, name).values()]) for name in "xyz")
    assert torch.equal(x, y) and not torch.equal(x, z)


def test_a_layer_that_only_one_of_them_has_and_files(small_model, small_inputs, tmp_path):
    from peft import PeftModel

    from pefttools.checkpoint import save_adapter

    ours = attach(small_model(), LoRAConfig(4, 8, target_modules=["q_proj", "v_proj"]), name="a")
    attach(ours, LoRAConfig(2, 3, target_modules=["v_proj", "up_proj"]), name="b")
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(ours).values():
            parameter.normal_(std=0.3, generator=g)
    for kind in ("cat", "svd"):
        add_weighted_adapter(ours, ["a", "b"], [1.0, 2.0], kind, kind)
    path = "model.layers.1.mlp.up_proj"
    torch.testing.assert_close(deltas(ours, "cat")[path], 2 * deltas(ours, "b")[path])
    assert deltas(ours, "cat").keys() == deltas(ours, "a").keys() | deltas(ours, "b").keys()

    set_adapter(ours, "svd")
    save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(small_model(), tmp_path)
    assert torch.equal(ours(**small_inputs()).logits, theirs(**small_inputs()).logits)
    expected = ours(**small_inputs()).logits
    torch.testing.assert_close(merge(ours)(**small_inputs()).logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(detach(unmerge(ours))(**small_inputs()).logits, small_model()(**small_inputs()).logits)


def test_the_worked_number():
    one, two, four = (torch.tensor([[float(i)]]) for i in (1, 2, 4))
    for kind, expected in (("cat", 6), ("svd", 6), ("linear", 12)):
        A, B = combined([(one, two), (one, four)], [1, 1], kind)
        assert (B @ A).item() == pytest.approx(expected)


@pytest.mark.parametrize("change, message", [
    ({"names": ["a", "c"]}, "there is no adapter 'c'; this model has a, b"),
    ({"weights": [1.0]}, "one finite number for each"),
    ({"weights": [1.0, float("nan")]}, "one finite number for each"),
    ({"names": [], "weights": []}, "one finite number for each"),
    ({"new_name": "a"}, "new_name must be a new name without dots; got 'a' beside a, b"),
    ({"new_name": "x.y"}, "new_name must be a new name without dots"),
    ({"kind": "mean"}, "kind must be one of svd, cat, linear.*got 'mean'"),
    ({"kind": "linear"}, r"all adapters must have the same r; they have \[4, 2\]"),
    ({"kind": "ties"}, r"all adapters must have the same r"),
    ({"density": 0.0}, r"density must be in \(0, 1\]"),
    ({"rank": 0}, "r must be a whole number"),
])
def test_bad_arguments_change_nothing(change, message, small_model):
    ours, _ = both(small_model, ranks=(4, 2))
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match=message):
        add_weighted_adapter(ours, **({"names": ["a", "b"], "weights": [1, 1], "new_name": "new"} | change))
    assert ours.state_dict().keys() == before.keys() and list(attached(ours).configs) == ["a", "b"]


def test_what_does_not_add_up_is_refused(small_model):
    with pytest.raises(ValueError, match="one is a DoRAConfig"):
        add_weighted_adapter(attach(small_model(), DoRAConfig(r=2)), ["default"], [1], "new")
    with pytest.raises(ValueError, match="to_plain_lora"):
        add_weighted_adapter(attach(small_model(), LoRAConfig(r=2, init="pissa")), ["default"], [1], "new")
    with pytest.raises(ValueError, match=re.escape("unmerge(model) first")):
        add_weighted_adapter(merge(attach(small_model(), LoRAConfig(r=2))), ["default"], [1], "new")
