"""The formula: its terms by hand, its moments, and what it refuses."""
from __future__ import annotations

import json

import pytest

from pefttools.vram.formula import estimate
from pefttools.vram.job import DTYPES, METHODS, Job, make_job
from pefttools.vram.memory import TERMS
from pefttools.vram.presets import config_of
from pefttools.vram.shape import shape_of
from pefttools.vram.terms import activations, adapters, attention, logits, optimizer, weights
from pefttools.vram.terms.kept import Tokens, tokens_of
from pefttools.vram.terms.margin import margin
from pefttools.vram.terms.model import layers_of
from pefttools.vram.terms.tensors import Tensors, block, bytes_of, numbers

ONE_B = "llama-3.2-1b"


def shape(name=ONE_B):
    return shape_of(config_of(name))


def kib_a_token(method, library="pefttools", **fields):
    """KiB that a middle layer of Llama-3.2-1B keeps for a token; B·T so large that vectors do not show."""
    job = Job(ONE_B, method, batch=16, seq=4096, library=library, **fields)
    t = tokens_of(job)
    return layers_of(job, shape(), t).kept[8].total / t.N / 1024


# ---------------------------------------------------------------------------------------- weights and constants

def test_weights_of_one_billion_by_hand():
    job, s = Job(ONE_B, "full"), shape()
    assert numbers(weights.base_tensors(s)) == 1_235_814_400
    assert numbers(weights.linear_tensors(s)) == 973_078_528
    assert weights.weights(job, s) == 2 * 1_235_814_400                     # the tied head once
    assert weights.weights(Job(ONE_B, "qlora"), s) == 973_078_528 // 2 + 2 * (1_235_814_400 - 973_078_528)


def test_nf4_constants_to_the_byte():
    n = 2048 * 8192
    assert weights.nf4_constants(n, False) == 4 * n // 64 + 512
    assert weights.nf4_constants(n, True) == n // 64 + 512 + block(4 * n // 64 // 256) + 1024 + 512
    assert weights.nf4_bits(False) == 4.5 and weights.nf4_bits(True) == pytest.approx(4.127, abs=2e-4)


@pytest.mark.parametrize("double", [False, True], ids=["nf4", "nf4-dq"])
def test_nf4_constants_are_those_of_the_layer(double):
    from torch import nn

    from pefttools.qlora import NF4Linear

    q = NF4Linear(nn.Linear(96, 80, bias=False), double_quant=double).quantized
    held = [tensor for name, tensor in vars(q).items() if name != "packed" and hasattr(tensor, "untyped_storage")]
    assert sum(block(tensor.untyped_storage().nbytes()) for tensor in held) == weights.nf4_constants(96 * 80, double)
    assert q.packed.numel() == 96 * 80 // 2


def test_blocks():
    assert [block(n) for n in (0, 1, 512, 513)] == [0, 512, 512, 1024]
    assert bytes_of([Tensors(3, 2), Tensors(1000)], 4) == 2 * 512 + 4096
    assert bytes_of([Tensors(2049)], 0.5) == 1536                           # 1,025 bytes of codes


# ---------------------------------------------------------------------------------------- adapters and optimizers

def test_counts_by_hand():
    s = shape()
    assert adapters.trainable(Job(ONE_B, "lora", r=16, targets="all-linear"), s) == 11_272_192
    assert adapters.trainable(Job(ONE_B, "prompt", length=20), s) == 40_960
    assert adapters.trainable(Job(ONE_B, "llama_adapter", length=10), s) == 163_848
    assert adapters.trainable(Job(ONE_B, "bottleneck"), s) == 4_228_096
    assert adapters.trainable(Job(ONE_B, "bottleneck", options={"placement": "houlsby"}), s) == 8_456_192
    assert adapters.trainable(Job(ONE_B, "ptuning", length=20), s) == 12_630_016
    gpt3 = shape("gpt-3-175b")
    fused = adapters.trainable(Job("gpt-3-175b", "lora", r=4), gpt3)      # c_attn is q, k and v in one
    assert fused == 96 * 4 * (12288 + 3 * 12288)


def test_adamw_and_its_temporary():
    s, job = shape(), Job(ONE_B, "lora", r=16, targets="all-linear")
    assert adapters.adapter(job, s) == adapters.gradients(job, s) == 4 * 11_272_192
    assert optimizer.optimizer_state(job, s) == 2 * 4 * 11_272_192
    assert optimizer.step_temporary(job, s) == 4 * 11_272_192
    sgd = job.but(optimizer="sgd")
    assert optimizer.optimizer_state(sgd, s) == 0 == optimizer.step_temporary(sgd, s)


def test_eight_bits_and_their_exception():
    s = shape()
    small = Job(ONE_B, "ia3", optimizer="adamw_8bit")
    large = Job(ONE_B, "lora", optimizer="adamw_8bit", targets="all-linear")
    assert optimizer._bnb(4095, 8, False) == 2 * block(4 * 4095)            # below 4,096: float32
    assert optimizer._bnb(4096, 8, False) == 2 * 4096 + 2 * 512
    assert optimizer._bnb(100_000, 8, True) == 2 * block(4 * 391)           # paged: only the scales
    assert optimizer.optimizer_state(large, s) < 0.3 * optimizer.optimizer_state(large.but(optimizer="adamw"), s)
    assert optimizer.optimizer_state(small, s) > 0


def test_adafactor_is_factored():
    s = shape()
    full = Job(ONE_B, "full", optimizer="adafactor")
    assert optimizer.factored((2048, 8192)) == 4 * (2048 + 8192)
    assert optimizer.optimizer_state(full, s) < 0.005 * 4 * 1_235_814_400


# ---------------------------------------------------------------------------------------- activations

def test_activations_of_one_layer_in_the_notation_of_the_chapter():
    h, q, kv, m, H = 2048, 2048, 512, 8192, 32
    assert kib_a_token("full") == pytest.approx((16 * h + 4 * q + 4 * kv + 8 * m + 4 * H + 8) / 1024, rel=1e-4)
    assert kib_a_token("ln_tuning") == pytest.approx((12 * h + 4 * q + 4 * kv + 6 * m + 4 * H + 8) / 1024, rel=1e-4)
    assert kib_a_token("llama_adapter", options={"layers": 1}) == pytest.approx(
        0, abs=1e-9)                                                       # layer 8: no gradient comes that far down
    all_linear = (8 * h + 4 * q + 4 * kv + 6 * m + 4 * H + 8) / 1024
    ours, pefts = (kib_a_token("lora", library, targets="all-linear") for library in ("pefttools", "peft"))
    assert ours == pytest.approx(all_linear + (4 * h + 2 * m + 7 * 64) / 1024, rel=1e-4)
    inputs = 5 * h + q + m                                                 # q k v gate up; o; down
    assert pefts == pytest.approx(all_linear + (4 * inputs + 7 * 64) / 1024, rel=1e-4)


@pytest.mark.parametrize("method, library, published", [
    ("full", "pefttools", 106), ("lora", "peft", 154.6), ("dora", "peft", 292.8), ("dora", "pefttools", 98.2)])
def test_activations_against_the_first_measurements(method, library, published):
    """KiB a token and layer at 1B shapes, traced on real models before this formula was written (r = 16)."""
    fields = {} if method == "full" else {"targets": "all-linear"}
    assert kib_a_token(method, library, **fields) == pytest.approx(published, rel=0.005)


def test_dropout_in_peft_keeps_a_byte_a_number():
    with_it = kib_a_token("lora", "peft", targets="all-linear", options={"lora_dropout": 0.05})
    without = kib_a_token("lora", "peft", targets="all-linear")
    assert with_it - without == pytest.approx((5 * 2048 + 2048 + 8192) / 1024, rel=1e-6)


def test_eager_attention_is_quadratic_and_flash_is_not():
    s = shape()

    def kept(attention_kind, seq):
        job = Job(ONE_B, "lora", batch=1, seq=seq, attention=attention_kind)
        return layers_of(job, s, tokens_of(job)).kept[8].total / seq

    assert kept("flash", 4096) == kept("flash", 2048)
    assert kept("eager", 4096) - kept("eager", 2048) == 6 * s.H * 2048     # softmax in float32 and in bfloat16


@pytest.mark.parametrize("fields, kernel", [
    ({}, "flash"), ({"padded": True}, "efficient"), ({"method": "prefix"}, "efficient"),
    ({"attention": "eager"}, "eager"), ({"gpu": "t4", "dtype": "float16"}, "math"),
    ({"gpu": "t4", "dtype": "float16", "padded": True}, "efficient"),
    ({"gpu": "h100"}, "flash"), ({"dtype": "float32", "padded": True}, "efficient")], ids=str)
def test_kernels(fields, kernel):
    assert attention.kernel(Job(ONE_B, **fields), shape()) == kernel


def test_layers_with_a_window_have_a_mask_once_rows_are_longer():
    s = shape("gemma-3-1b")
    assert set(s.windows) == {0, 512} and len(s.windows) == 26

    def masks(seq):
        job = Job("gemma-3-1b", batch=2, seq=seq)
        return [kept.get("mask", 0) for kept in layers_of(job, s, tokens_of(job)).kept]

    assert set(masks(256)) == {0}
    assert masks(1024) == [2 * 2 * 1024 * 1024 if window else 0 for window in s.windows]


def test_nothing_is_kept_below_the_first_adapter():
    job = Job(ONE_B, "lora", targets=("q_proj", "v_proj"), options={"layers_to_transform": [14, 15]})
    layers = layers_of(job, shape(), tokens_of(job))
    assert [bool(kept.total) for kept in layers.kept] == [False] * 14 + [True] * 2
    assert layers.kept[14].total < layers.kept[15].total                   # its input norm and k need no gradient


# ---------------------------------------------------------------------------------------- logits and moments

def test_logits_are_14_bytes_a_word():
    s, job = shape(), Job(ONE_B, batch=4, seq=512)
    assert logits.loss_peak(job, s, tokens_of(job)) == 14 * 4 * 512 * s.V
    assert logits.loss_peak(job.but(dtype="float32"), s, tokens_of(job)) == 16 * 4 * 512 * s.V
    assert logits.loss_peak(job.but(keep_outputs=False), s, tokens_of(job)) == 12 * 4 * 512 * s.V


def test_moments():
    assert estimate(ONE_B, "lora", 4, 512).peak_at == "loss: cross entropy"
    assert estimate(ONE_B, "full", 1, 64).peak_at == "step"
    large = estimate("llama-65b", "qlora", 1, 4096, targets="all-linear", checkpointing=True)
    assert large.peak_at == "backward: model.layers.79"
    full = estimate(ONE_B, "full", 1, 16)
    assert full.total == pytest.approx(2 * 5 * 1_235_814_400, rel=0.01)    # weights, gradients, m, v and √v


def test_accumulation_keeps_gradients_in_the_forward_pass():
    one, four = (estimate(ONE_B, "full", 4, 1024, accumulate=n) for n in (1, 4))
    assert four.total - one.total == 2 * 1_235_814_400


@pytest.mark.parametrize("method", METHODS)
def test_terms_are_complete_and_grow_with_the_batch(method):
    small, large = (estimate("tiny", method, batch, 256, options={"layers": 4} if method == "llama_adapter" else {})
                    for batch in (1, 8))
    for memory in (small, large):
        assert list(memory.terms) == list(TERMS) and all(n >= 0 for n in memory.terms.values())
        assert memory.total == max(moment.total for moment in memory.timeline)
        assert memory.total < memory.reserved < memory.device
        assert 0 < memory.trainable <= memory.parameters
    assert small.total < large.total


def test_checkpointing_and_quantization_save():
    plain = estimate(ONE_B, "lora", 4, 2048, targets="all-linear")
    assert estimate(ONE_B, "lora", 4, 2048, targets="all-linear", checkpointing=True).total < plain.total
    assert estimate(ONE_B, "qlora", 4, 2048, targets="all-linear").terms["weights"] < 0.45 * plain.terms["weights"]
    assert estimate(ONE_B, "lora", 4, 2048, targets="all-linear", library="peft").total > plain.total


def test_it_is_quick_and_can_be_written_as_json():
    import time

    estimate(ONE_B, "lora")
    start = time.process_time()
    for _ in range(20):
        memory = estimate("llama-3.1-405b", "qlora", 4, 4096, checkpointing=True)
    assert time.process_time() - start < 2                                  # a slider moves it
    assert json.loads(json.dumps(memory.terms)) == memory.terms


def test_margin_is_stated():
    assert margin(32 * 2**20, 0, 10**9) == 21 * 2**20
    assert margin(0, 10 * 2**20, 2**30) == margin(0, 2**30, 10 * 2**20) == 25 * 2**20


# ---------------------------------------------------------------------------------------- arguments

def test_peft_allows_a_rank_above_the_matrix_as_it_does():
    assert estimate(ONE_B, "lora", r=600, library="peft").trainable == 16 * 600 * (2048 + 2048 + 2048 + 512)


def test_a_job_is_as_good_as_its_arguments():
    job = make_job(ONE_B, "lora", 2, 128, r=8)
    assert estimate(job).total == estimate(ONE_B, "lora", 2, 128, r=8).total


def test_letters():
    s = shape()
    assert (s.L, s.h, s.H, s.H_kv, s.d, s.q, s.kv, s.m, s.V) == (16, 2048, 32, 8, 64, 2048, 512, 8192, 128256)
    assert Tokens(2, 3, 5).N == 6 and DTYPES["bfloat16"] == 2
    assert activations.Method() == activations.Method()
