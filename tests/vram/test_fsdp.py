"""FSDP's rules: states are divided, one batch's activations are not, a layer and the next are whole."""
from __future__ import annotations

import pytest

from pefttools.vram.fsdp import shard, unit_of
from pefttools.vram.ledger import Ledger
from pefttools.vram.simulator import simulate

DEEP = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512,
        "tie_word_embeddings": True}
LAYER = 2 * 256 * 256 + 2 * 64 * 256 + 3 * 256 * 1024 + 2 * 256
ROOT = 512 * 256 + 256


@pytest.mark.parametrize("where, unit", [
    ("model.layers.3.mlp", "model.layers.3"), ("model.layers.11", "model.layers.11"),
                                         ("lm_head", ""), ("base_model.model.model.layers.0.self_attn.q_proj",
                                                           "base_model.model.model.layers.0"),
    ("transformer.h.2.attn", "transformer.h.2")])
def test_units_are_decoder_layers(where, unit):
    assert unit_of(where) == unit


def test_states_are_divided_and_activations_are_not():
    one, eight = (simulate(DEEP, "full", 4, 256, gpus=gpus) for gpus in (1, 8))
    assert "backward" in eight.peak_at
    assert eight.terms["optimizer"] == pytest.approx(one.terms["optimizer"] / 8, rel=0.1)
    assert eight.terms["activations"] == pytest.approx(one.terms["activations"], rel=0.01)
    assert eight.total < one.total and eight.reserved < one.reserved


def test_weights_are_a_shard_and_at_most_two_layers_and_the_root():
    memory = simulate(DEEP, "full", 1, 64, gpus=4)
    most = max(moment.terms["weights"] for moment in memory.timeline)
    assert most == pytest.approx(2 * ((12 * LAYER + ROOT) / 4 + 2 * LAYER + ROOT), rel=0.03)


def test_gradients_are_never_whole():
    one, four = (max(moment.terms["gradients"] for moment in simulate(DEEP, "full", 1, 64, gpus=gpus).timeline)
                 for gpus in (1, 4))
    assert one / 4 < four < one / 2


def test_checkpointing_gathers_again():
    memory = simulate(DEEP, "lora", 1, 64, gpus=4, checkpointing=True)
    shards = 2 * (12 * LAYER + ROOT) / 4
    backward = [moment.terms["weights"] for moment in memory.timeline if moment.phase == "backward"]
    assert max(backward) == pytest.approx(shards + 2 * (2 * LAYER + ROOT), rel=0.05)


def test_between_steps_only_shards_are_left():
    memory = simulate(DEEP, "full", 1, 64, gpus=4)
    step = [moment.terms["weights"] for moment in memory.timeline if moment.phase == "step"]
    assert min(step) == pytest.approx(2 * (12 * LAYER + ROOT) / 4, rel=0.02)
    assert memory.notes


def test_no_gpu_at_all():
    with pytest.raises(ValueError, match="gpus=0"):
        shard(Ledger(), 0)
