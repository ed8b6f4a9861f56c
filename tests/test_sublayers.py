"""pefttools.sublayers: names, numbers and widths; notes that are forgotten with their module."""
from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

from pefttools.inject import attach
from pefttools.lora import LoRAConfig
from pefttools.placements import AdapterConfig
from pefttools.sublayers import Notes, features, inside, layers_of, pick_layers, sublayers_of
from pefttools.targets import plain_modules

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family, stacks", [
    ("llama", ["model.layers"]), ("qwen2", ["model.layers"]), ("gpt2", ["transformer.h"]),
    ("opt", ["model.decoder.layers"]), ("bert", ["bert.encoder.layer"]), ("t5", ["encoder.block", "decoder.block"])])
def test_layers_and_what_is_in_them(family, stacks, small_model):
    model = small_model(family)
    layers = layers_of(model)
    assert layers == {f"{stack}.{i}": (stack, i) for stack in stacks for i in range(3)}
    names = sublayers_of(model)
    for path in (names.attention, names.feedforward, names.beside):
        found = inside(model, layers, path)
        assert len(found) == len(layers) and all(model.get_submodule(name) is module for name, module in found.items())
    assert pick_layers(model, [0, 2], 0) == [f"{stack}.2" for stack in stacks]
    one = inside(model, [f"{stacks[0]}.1"], names.attention)
    assert len(one) == 1 and next(iter(one)).startswith(f"{stacks[0]}.1.")
    assert {features(module)[1] for module in inside(model, layers, names.attention).values()} == {32}
    assert {features(module) for module in inside(model, layers, names.feedforward).values()} == \
        {(128 if family == "gpt2" else 48, 32)}


def test_modules_are_the_models_own_under_their_own_names(small_model):
    plain = dict(small_model().named_modules())
    plain.pop("")
    model = small_model()
    own = plain_modules(model)
    assert list(own) == list(plain)
    for name, config in (("a", AdapterConfig("bapna", bottleneck=2)), ("b", AdapterConfig("houlsby", bottleneck=2)),
                         ("c", AdapterConfig("parallel", bottleneck=2, train_layer_norms=True))):
        attach(model, config, name=name)
        now = plain_modules(model)
        assert set(now) == set(own) and all(now[key] is own[key] for key in own), name
    lora = attach(small_model(), LoRAConfig(r=2, target_modules="all-linear"))
    assert list(plain_modules(lora)) == list(own)


def test_notes_are_forgotten_with_the_module_and_not_copied():
    notes, module = Notes(), nn.Linear(2, 2)
    notes[module] = "here"
    assert notes[module] == notes.get(module) == "here" and notes.get(nn.Linear(2, 2)) is None
    assert copy.deepcopy(notes).get(module) is None and pickle.loads(pickle.dumps(notes)).get(module) is None
    del module
    gc.collect()
    assert len(notes._of) == 0


def test_features_of_gpt2s_conv1d_are_turned_round():
    from transformers.pytorch_utils import Conv1D

    assert features(nn.Linear(3, 5)) == (3, 5) == features(Conv1D(5, 3))
    assert Conv1D(5, 3)(torch.zeros(2, 3)).shape == (2, 5)
