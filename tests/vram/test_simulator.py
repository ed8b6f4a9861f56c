"""The simulated step against what is known exactly: states, activations by formula, and what each setting changes."""
from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from pefttools.vram.optimizers import state_bytes
from pefttools.vram.simulator import run, simulate, simulate_peft
from pefttools.vram.skeleton import build, build_base
from pefttools.vram.job import Job

# Llama-3.2-1B's proportions, an eighth of its width and two layers
TINY = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 1003,
        "tie_word_embeddings": True, "max_position_embeddings": 4096}


def tiny(**changes):
    return TINY | changes


def test_terms_of_full_fine_tuning():
    memory = simulate(TINY, "full", 2, 64)
    assert memory.trainable == memory.parameters
    assert memory.terms["weights"] == pytest.approx(2 * memory.parameters, rel=0.01)
    assert memory.terms["optimizer"] >= 2 * 2 * memory.parameters       # m and v; at the step √v too
    assert memory.total == sum(memory.terms.values()) <= memory.reserved


def test_terms_of_lora_are_sixteen_bytes_a_parameter():
    memory = simulate(TINY, "lora", 2, 64, r=8, targets="all-linear")
    adapter = max(moment.terms["adapter"] for moment in memory.timeline)
    assert adapter == pytest.approx(4 * memory.trainable, rel=0.01)
    assert max(moment.terms["gradients"] for moment in memory.timeline) == pytest.approx(4 * memory.trainable, rel=0.01)
    assert memory.terms["optimizer"] == pytest.approx(8 * memory.trainable, rel=0.02)


def activations(memory):
    return max(moment.terms["activations"] for moment in memory.timeline)


def test_activations_of_a_layer_are_the_published_formula():
    """16h + 4q + 4k + 8m bytes a token and layer, and 4 a head (logsumexp), 4 each of two norms (rsqrt)."""
    h, q, k, m, heads = 256, 256, 64, 1024, 8
    kept = {(layers, T): activations(simulate(tiny(num_hidden_layers=layers), "full", 1, T))
            for layers in (2, 3) for T in (256, 512)}
    slope = (kept[3, 512] - kept[2, 512] - kept[3, 256] + kept[2, 256]) / 256
    assert slope == 16 * h + 4 * q + 4 * k + 8 * m + 4 * heads + 2 * 4


def test_logits_are_fourteen_bytes_and_twelve_without_the_outputs():
    held, dropped = (simulate(TINY, "lora", 2, 256, keep_outputs=keep).terms["logits"] for keep in (True, False))
    assert held == 14 * 1003 * 2 * 256
    assert dropped == 12 * 1003 * 2 * 256


def test_checkpointing_keeps_a_layers_input_only():
    def kept(layers):
        memory = simulate(tiny(num_hidden_layers=layers), "full", 1, 512, checkpointing=True)
        return max(moment.terms["activations"] for moment in memory.timeline if moment.phase in ("forward", "loss"))

    assert kept(6) - kept(5) == 2 * 256 * 512


def test_accumulation_keeps_gradients_while_the_next_batch_runs():
    one, two = (simulate(TINY, "full", 2, 512, accumulate=n) for n in (1, 2))
    assert one.terms["gradients"] == 0
    assert two.terms["gradients"] == pytest.approx(2 * two.parameters, rel=0.01)


def test_padding_costs_a_mask_in_every_layer_and_expanded_keys():
    plain, padded = (activations(simulate(TINY, "full", 2, 512, padded=padded)) for padded in (False, True))
    mask, keys = 2 * 2 * 512 * 512, 2 * (2 * 2 * 512) * (256 - 64)
    assert padded - plain == pytest.approx(2 * (mask + keys), rel=0.15)


def test_eager_attention_grows_with_the_square():
    sdpa, eager = ([activations(simulate(TINY, "full", 1, T, attention=kind)) for T in (128, 256, 512)]
                   for kind in ("sdpa", "eager"))
    assert sdpa[2] - sdpa[1] == pytest.approx(2 * (sdpa[1] - sdpa[0]), rel=0.01)
    assert eager[2] - eager[1] > 3 * (eager[1] - eager[0])


def test_a_t4_without_a_mask_takes_the_math_kernel():
    kinds = {gpu: activations(simulate(TINY, "lora", 1, 512, gpu=gpu, dtype="float16")) for gpu in ("t4", "a100-40")}
    assert kinds["t4"] > kinds["a100-40"] + 2 * (2 * 8 * 512 * 512)      # two layers, 16 bits, once at least


@pytest.mark.parametrize("optimizer, bits, paged", [("adamw_8bit", 8, False), ("paged_adamw_8bit", 8, True),
                                                   ("paged_adamw", 32, True)])
def test_optimizer_states_are_bitsandbytes(optimizer, bits, paged):
    memory = simulate(TINY, "full", 4, 256, optimizer=optimizer)
    sizes = [1003 * 256] + 2 * (2 * [256 * 256] + 2 * [64 * 256] + 3 * [256 * 1024]) + 5 * [256]
    assert sum(sizes) == memory.trainable and "backward" in memory.peak_at
    states = sum(state_bytes(n, bits, paged) for n in sizes)
    assert memory.terms["optimizer"] == pytest.approx(states + 2048, abs=512 * 80)


@pytest.mark.parametrize("n, bits, paged, expected", [
    (4096, 8, False, 2 * 4096 + 2 * 4 * 16), (4095, 8, False, 8 * 4095), (10 ** 6, 8, True, 2 * 4 * 3907),
    (10 ** 6, 32, True, 0),
    (99_999, 32, True, 8 * 99_999)])
def test_state_bytes(n, bits, paged, expected):
    assert state_bytes(n, bits, paged) == expected


def test_adafactor_keeps_rows_and_columns():
    memory = simulate(TINY, "full", 4, 512, optimizer="adafactor")
    assert memory.terms["optimizer"] < 0.05 * memory.terms["weights"]


def test_float32_masters():
    memory = simulate(TINY, "full", 2, 64, master=True)
    assert memory.terms["weights"] == pytest.approx(4 * memory.parameters, rel=0.01)
    with pytest.raises(ValueError, match="master"):
        simulate(TINY, "lora", 2, 64, master=True)


def test_four_bits_and_their_scales():
    memory = simulate(TINY, "qlora", 1, 64)
    linear = 2 * (2 * 256 * 256 + 2 * 64 * 256 + 3 * 256 * 1024)
    assert memory.terms["weights"] == pytest.approx(linear / 2 + 2 * 1003 * 256, rel=0.02)
    assert memory.terms["constants"] == pytest.approx(linear / 64 * (1 + 4 / 256), abs=2 * 7 * 3072)
    assert max(life.terms["temporary"] for life in memory.timeline) >= 2 * 256 * 1024      # one dequantized weight


@pytest.mark.parametrize("library", ["pefttools", "peft"])
@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "ln_tuning", "prompt", "ptuning", "prefix"])
def test_every_method_runs_and_counts_as_the_library_does(method, library):
    memory = simulate(TINY, method, 1, 32, library=library)
    assert memory.trainable == simulate(TINY, method, 1, 16, library="peft").trainable
    assert 0 < memory.trainable < memory.parameters
    assert memory.terms["adapter"] >= 2 * memory.trainable


@pytest.mark.parametrize("method, options", [("bottleneck", {}), ("llama_adapter", {"layers": 1}), ("qdora", {})],
                         ids=["bottleneck", "llama_adapter", "qdora"])
def test_methods_of_ours_alone(method, options):
    assert simulate(TINY, method, 1, 32, options=options).trainable > 0


def test_peft_keeps_more_than_we_do():
    ours, theirs = (activations(simulate(TINY, "lora", 2, 256, targets="all-linear", library=library))
                    for library in ("pefttools", "peft"))
    assert theirs > 1.2 * ours


def test_pefts_own_files_and_the_cache_it_leaves():
    fields = {"peft_type": "VERA", "r": 16, "target_modules": ["q_proj", "v_proj"]}
    without, cached = (simulate_peft(TINY, fields, 2, 256, padded=True, use_cache=use) for use in (False, True))
    assert cached.total - without.total == pytest.approx(2 * 2 * 2 * 2 * 256 * 64, rel=0.3)   # K and V, layers, …
    assert simulate_peft(TINY, None, 1, 32).trainable == simulate(TINY, "full", 1, 32).trainable


@pytest.mark.parametrize("fields, word", [({"peft_type": "LORRA"}, "LORA"), ({"peft_type": "LORA", "rr": 8}, "rr")],
                         ids=["type", "field"])
def test_a_file_that_peft_would_not_read(fields, word):
    with pytest.raises(ValueError, match=word):
        simulate_peft(TINY, fields, 1, 32)


def test_smaller_batches_before_leave_the_peak_and_may_raise_reserved():
    plain, varied = (simulate(TINY, "full", 2, 256, shapes=shapes) for shapes in ((), ((2, 100), (1, 300))))
    assert varied.total == plain.total and varied.reserved >= plain.reserved


def test_timeline_is_bounded_and_has_the_peak():
    memory = simulate(TINY, "lora", 2, 128)
    assert 50 < len(memory.timeline) <= 500
    assert max(moment.total for moment in memory.timeline) == memory.total
    assert {"forward", "backward", "step"} <= {moment.phase for moment in memory.timeline}


def test_holders_add_up_to_the_activations():
    memory = simulate(TINY, "lora", 2, 128)
    assert sum(memory.holders.values()) == memory.terms["activations"]
    assert any("layers.1" in name for name in memory.holders)


def test_twice_is_the_same():
    first, second = (simulate(TINY, "lora", 2, 64) for _ in range(2))
    assert (first.terms, first.reserved) == (second.terms, second.reserved)


def test_nothing_is_left_behind():
    import transformers.masking_utils as masking
    from pefttools import nf4_linear

    before = masking.fast_all, nf4_linear._in_scratch, torch.nn.Module.__call__
    simulate(TINY, "qlora", 1, 16)
    with pytest.raises(ZeroDivisionError):
        model = build(Job(TINY, "lora", 1, 16))
        model.forward = lambda **inputs: 1 / 0
        run(Job(TINY, "lora", 1, 16), model)
    assert before == (masking.fast_all, nf4_linear._in_scratch, torch.nn.Module.__call__)


def test_the_base_alone_is_transformers_own_class():
    assert type(build_base(Job(TINY))).__name__ == "LlamaForCausalLM"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's peak from /proc, which only Linux has")
def test_seventy_billion_in_half_a_minute_and_two_gigabytes():
    """A process of its own: its time and memory with the imports. On a quiet core its wall time is its processor time."""
    code = ("import json, time; from pathlib import Path; from pefttools.vram import simulate\n"
            "memory = simulate('llama-3.1-70b', 'qlora', 1, 2048, checkpointing=True)\n"
            # not ru_maxrss: a child takes that over from its parent
            "[peak] = [line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')]\n"
            "print(json.dumps([memory.parameters - memory.trainable, time.process_time(), int(peak) * 1024]))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    parameters, seconds, resident = json.loads(done.stdout.splitlines()[-1])
    assert parameters == 70_553_706_496
    assert seconds < 30
    assert resident < 2e9