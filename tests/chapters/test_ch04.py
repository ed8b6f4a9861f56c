"""Chapter 04: its exercises against the library and bitsandbytes, the figures of its prose and of its sources, its pictures."""

from __future__ import annotations

import math
import re
from pathlib import Path
from statistics import NormalDist

import pytest
import torch

from pefttools import absmax, codebook, double_quant, nf4
from pefttools.grading.check import verdict_on
from pefttools.grading.exercises import ch04_nf4 as chapter
from pefttools.widgets import nf4 as pictures

SOURCE = (Path(__file__).parents[2] / "solutions" / "04_nf4.py").read_text(encoding="utf-8")
BY_NAME = {exercise.name: exercise for exercise in chapter.EXERCISES}
SIX = torch.tensor([0.05, -0.3, 0.95, 0.0, -0.02, 0.5])
SLIDE = torch.tensor(chapter.SLIDE)


def passes(name, work):
    for seed in (4, 5, 6):
        verdict = verdict_on(BY_NAME[name], work, seed)
        assert verdict.passed, verdict.text


def test_exercises_and_questions_have_what_the_standard_asks():
    assert set(BY_NAME) == {"nearest-level", "absmax-int8", "nf4-codebook", "nf4-quantize", "pack-nibbles",
                            "nf4-dequantize", "double-quantize", "storage-bytes"}
    for exercise in chapter.EXERCISES:
        assert len(exercise.mistakes) >= 5 and len(exercise.alternatives) >= 2
    assert chapter.EXERCISES[0].minutes <= 5 and chapter.EXERCISES[0].difficulty == 1
    assert 4 <= len(chapter.QUESTIONS) <= 6
    assert len({question.right for question in chapter.QUESTIONS}) >= 3, "the right letter must not be guessable"


# ------------------------------------------------------------------------------------------------ production's own work

def test_the_librarys_own_work_passes_as_the_students():
    passes("nearest-level", lambda values, levels: torch.bucketize(values, codebook.midpoints(levels)))
    passes("absmax-int8", lambda w, block_size: absmax.quantize_blockwise(w, block_size))
    passes("nf4-codebook", codebook.nf4_codebook)
    passes("nf4-quantize", lambda w, code, size: nf4.nearest_codes(w.flatten(), code, size))
    passes("pack-nibbles", nf4.pack)
    passes("nf4-dequantize", lambda packed, scales, code, shape, size, dtype: (
        code[nf4.unpack(packed).int()].view(-1, size) * scales[:, None]).view(shape).to(dtype))


def test_bitsandbytes_passes_as_the_students():
    functional = pytest.importorskip("bitsandbytes.functional")

    def quantize(w, code, block_size):
        if torch.equal(code, functional.get_4bit_type("nf4", device="cpu")):
            flat = w.flatten()
            try:
                packed, state = functional.quantize_4bit(flat, blocksize=block_size, quant_type="nf4")
            except (ValueError, RuntimeError, AssertionError):      # a block size that it does not have
                return nf4.nearest_codes(flat, code, block_size)
            return nf4.unpack(packed.flatten())[:w.numel()], state.absmax
        return nf4.nearest_codes(w.flatten(), code, block_size)     # levels that it does not have

    passes("nf4-quantize", quantize)
    assert torch.equal(torch.tensor(chapter.NF4), functional.get_4bit_type("nf4", device="cpu"))
    assert torch.allclose(chapter.dynamic(), functional.create_dynamic_map(), rtol=1e-6, atol=0)


def test_the_librarys_nearest_double_quantization_agrees_with_the_exercise():
    rng = torch.Generator().manual_seed(0)
    scales = 0.5 + 0.1 * torch.rand(700, generator=rng)
    codes, absmax2, offset = chapter.DOUBLE_QUANTIZE.reference(scales, codebook.dynamic_codebook(), 256)
    ours = double_quant.quantize_8bit(scales - offset, nearest=True)
    assert (codes != ours[0].long()).sum() <= 1 and torch.equal(absmax2, ours[1])


@pytest.mark.parametrize("double", [False, True])
def test_storage_is_what_the_librarys_tensors_take(double):
    for shape in ((704, 256), (3, 64), (17, 33), (256, 256)):
        q = nf4.quantize_nf4(torch.randn(*shape), double_quant=double)
        assert chapter.STORAGE_BYTES.reference(math.prod(shape), 64, double) == q.nbytes


# ------------------------------------------------------------------------------------------------ cases

@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_no_case_lies_on_an_edge(name):
    """Where the last bit of a quotient decided, two right works could differ."""
    for seed in range(8):
        for case in BY_NAME[name].cases(seed):
            if name == "nf4-quantize":
                blocks = case["w"].view(-1, case["block_size"])
                scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)
                assert torch.equal(chapter.nearest(blocks / scale, case["code"]),
                                   chapter.nearest(blocks * (1 / scale), case["code"]))
                assert blocks.view(-1).min() < -0.99 * blocks.abs().max()       # somewhere the largest is negative
            if name == "double-quantize":
                a = case["absmax"]
                assert a.mean().item() == a.double().mean().item() == a.flip(0).mean().item()
            if name == "pack-nibbles" and len(case["codes"]) > 1:
                assert chapter.pack_with(lambda x, y: y << 4 | x)(case["codes"]).tolist() != \
                    chapter.pack_with()(case["codes"]).tolist() or len(set(case["codes"].tolist())) == 1


def test_there_is_a_block_of_zeros_and_a_block_that_is_not_full():
    assert any((case["w"].view(-1, case["block_size"]) == 0).all(1).any() for case in BY_NAME["nf4-quantize"].cases(1))
    assert any((case["w"].view(-1, case["block_size"]) == 0).all(1).any() for case in BY_NAME["absmax-int8"].cases(1))
    assert any(len(case["absmax"]) % case["block_size"] for case in BY_NAME["double-quantize"].cases(1))
    assert any(case["n"] % case["block_size"] for case in BY_NAME["storage-bytes"].cases(1))


# ------------------------------------------------------------------------------------------------ figures of the prose

def test_slide_000_as_printed_and_right():
    """Errata 1 to 4."""
    mean, std = SIX.mean(), SIX.std(correction=0)
    assert f"{mean:.4f}" == "0.1967" and f"{std:.3f}" == "0.411"
    z = (SIX - mean) / std
    assert [f"{v:.3f}" for v in z.tolist()] == ["-0.357", "-1.209", "1.833", "-0.479", "-0.527", "0.738"]
    printed = torch.tensor([-0.357, -1.209, 1.833, -0.478, -0.527, 0.736])
    right = [f"{c:04b}" for c in chapter.nearest(printed, SLIDE).tolist()]
    assert right == ["0110", "0001", "1111", "0101", "0100", "1110"]
    assert f"{chapter.nearest(torch.tensor([0.47]), SLIDE).item():04b}" == "1100"


def test_six_weights_by_hand():
    codes, scale = chapter.quantize_with()(SIX.view(1, 6), codebook.NF4_CODE, 6)
    assert codes.tolist() == [8, 4, 15, 7, 7, 13] and "(8, 4, 15, 7, 7, 13)" in SOURCE
    back = codebook.NF4_CODE[codes] * scale
    assert [f"{v:.3f}" for v in back.tolist()] == ["0.076", "-0.270", "0.950", "0.000", "0.000", "0.534"]
    assert r"(0.076,\ -0.270,\ 0.95,\ 0,\ 0,\ 0.534)" in SOURCE
    assert r"(0.080,\ -0.284,\ 1,\ 0,\ 0,\ 0.563)" in SOURCE and r"(0.053,\ -0.316,\ 1,\ 0,\ -0.021,\ 0.526)" in SOURCE


def test_int8_by_hand():
    q, scale = absmax.quantize_blockwise(torch.tensor([0.3, -1.2, 0.05, 0.61]), 4)
    assert q.tolist() == [32, -127, 5, 65] and "(32, -127, 5, 65)" in SOURCE
    assert f"{1.2 / 254:.4f}" == "0.0047" and "0.0047" in SOURCE and f"{127 / 1.2:.2f}" == "105.83"
    assert f"{32 * 1.2 / 127:.3f}" == "0.302"


def test_one_level_by_hand():
    assert f"{1 - (1 / 32 + 1 / 30) / 2:.7f}" == "0.9677083"
    p = 0.9677083 - 0.4677083 / 8
    assert f"{p:.7f}" == "0.9092448"
    z, largest = NormalDist().inv_cdf(p), NormalDist().inv_cdf(0.9677083)
    assert (f"{z:.5f}", f"{largest:.5f}", f"{z / largest:.5f}") == ("1.33612", "1.84813", "0.72296")
    assert codebook.NF4_CODE[14].item() == pytest.approx(0.72296, abs=1e-5)
    assert codebook.NF4_CODE[7] == 0 and (codebook.NF4_CODE < 0).sum() == 7 and (codebook.NF4_CODE > 0).sum() == 8


def test_bits_of_the_prose():
    assert f"{4 + 8 / 64 + 32 / (64 * 256):.3f}" == "4.127" and f"{0.5 - 8 / 64 - 32 / 16384:.3f}" == "0.373"
    assert 65e9 * 0.373 / 8 / 1e9 == pytest.approx(3.0, abs=0.05)
    assert chapter.STORAGE_BYTES.reference(64, 64, False) == 32 + 4
    assert chapter.STORAGE_BYTES.reference(64 * 256, 64, True) == 8192 + 256 + 4 + 4


def test_answers_of_the_questions_hold():
    right = {question.name: question.right for question in chapter.QUESTIONS}
    block = torch.cat([0.1 * torch.randn(63, generator=torch.Generator().manual_seed(0)), torch.tensor([10.0])])
    codes, _ = chapter.quantize_with()(block.view(1, 64), codebook.NF4_CODE, 64)
    assert (codes[:63] == 7).float().mean() > 0.9 and codes[63] == 15 and right["nf4-q-outlier"] == "b"
    assert 10 * codebook.NF4_CODE[8].item() == pytest.approx(0.8, abs=0.01)
    q = chapter.NF4_DEQUANTIZE.reference(torch.tensor([0x7F], dtype=torch.uint8), torch.tensor([0.5]), codebook.NF4_CODE, (2,),
                                         2, torch.float32)
    assert q.tolist() == [0.0, 0.5] and right["nf4-q-byte"] == "c"
    assert 4 + 32 / 128 == 4.25 and right["nf4-q-bits"] == "b"
    steps, nf4_steps = (levels.diff() for levels in (pictures.least_error_levels(pictures.explorer_weights(), 64), codebook.NF4_CODE))
    assert steps.min() > nf4_steps.min() and right["nf4-q-optimal"] == "a"             # "coarser steps near 0 and finer ones far out"
    assert steps[0] < nf4_steps[0] and steps[-1] < nf4_steps[-1]


def test_no_source_is_quoted_that_bitsandbytes_does_not_have():
    ops = pytest.importorskip("bitsandbytes.backends.default.ops")
    import inspect

    text = inspect.getsource(ops)
    table = SOURCE.split("| the code does | because |")[1].split("**Go and look**")[0]
    for quoted in re.findall(r"^# \| `(.+?)` \|", table, re.MULTILINE):
        for part in quoted.split("(...,"):
            assert part.strip() in text, f"the chapter explains {quoted!r}"


def test_the_papers_fp4_is_bitsandbytes_with_one_level_moved():
    """E2M1 has 0.5/6 where bitsandbytes' FP4 has 0.0625/12; all other levels agree."""
    e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6
    ours = codebook.fp4_codebook()[:8].sort().values
    assert [i for i in range(8) if abs(e2m1[i] - ours[i]) > 1e-6] == [1]


# ------------------------------------------------------------------------------------------------ pictures

def test_explorer_shows_what_it_says():
    errors = pictures._explored(0.1, 0, 0.0, 64)[2]
    assert errors["Lloyd–Max"] < errors["NF4"] < errors["INT4"] < errors["FP4"]
    wide = pictures._explored(1.0, 0, 0.0, 64)[2]
    assert all(wide[name] == pytest.approx(errors[name], rel=1e-4) for name in errors)      # absmax takes the scale out
    spoilt = pictures._explored(0.1, 2, 0.0, 64)[2]
    assert all(spoilt[name] > errors[name] for name in errors)
    hurt = {name: spoilt[name] / errors[name] for name in errors}
    assert hurt["Lloyd–Max"] < hurt["NF4"] < min(hurt["FP4"], hurt["INT4"])
    skewed = pictures._explored(0.1, 0, 0.5, 64)[2]
    assert 1.2 < skewed["NF4"] / errors["NF4"] < 1.3 and skewed["Lloyd–Max"] < errors["Lloyd–Max"]
    large = pictures._explored(0.1, 20, 0.0, 4096)[2]
    assert large["FP4"] < large["INT4"]                  # "Find a setting in which FP4 beats INT4"
    for values in ({}, {"outliers": 3, "data_type": "FP4"}, {"skew": -0.8, "block_size": 4096, "data_type": "Lloyd–Max"}):
        figure = pictures.histogram_figure(**values)
        written = {text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text"))}
        explored = pictures._explored(*(({"spread": 0.1, "outliers": 0, "skew": 0.0, "block_size": 64} | values)[k]
                                        for k in ("spread", "outliers", "skew", "block_size")))[2]
        assert all(f"{v:.3f}" in written and f"{v:.3f}" in pictures.explorer_alt(**values) for v in explored.values())
    with pytest.raises(ValueError, match="data_type"):
        pictures.histogram_figure(data_type="NF5")


def test_explorer_has_a_first_frame_without_a_front_end(capsys):
    figure = pictures.explorer()
    frame = figure.frame(outliers=3, block_size=256, data_type="INT4")
    assert "3 in 1000" in frame["text/html"] and "INT4" in frame["text/html"] and len(frame["image/png"]) > 5_000


def test_skew_keeps_mean_and_variance():
    for skew in (-0.8, 0.0, 0.8):
        w = pictures.explorer_weights(0.5, skew=skew)
        assert abs(w.mean()) < 0.02 and w.std().item() == pytest.approx(0.5, rel=0.05)


def test_lloyd_max_levels_are_the_best_of_the_four():
    rng = torch.Generator().manual_seed(3)
    for w in (torch.randn(1 << 14, generator=rng), torch.rand(1 << 14, generator=rng) - 0.3):
        errors = {name: pictures.relative_error(w, pictures.type_levels(name, w, 64), 64) for name in pictures.TYPES}
        assert min(errors, key=errors.get) == "Lloyd–Max"


def test_the_search_finds_the_least_error_there_is():
    """Against every way to cut a few numbers into three cells; and where Lloyd's iteration stops too early."""
    rng = torch.Generator().manual_seed(5)
    for _ in range(5):
        w = torch.randint(-40, 41, (9,), generator=rng).float()             # one block: absmax is the same for all
        w[0] = 40.0                                                          # every number a bin of its own
        ordered = w.sort().values.double()
        errors = []
        for i in range(1, 8):
            for j in range(i + 1, 9):
                cells = ordered[:i], ordered[i:j], ordered[j:]
                errors.append(sum((cell - cell.mean()).square().sum().item() for cell in cells))
        found = pictures.least_error_levels(w, 9, levels=3, bins=81)
        assert pictures.relative_error(w, found, 9) == pytest.approx((min(errors) / w.square().sum().item()) ** 0.5, rel=1e-5)

    def lloyd(w, size):
        blocks = w.view(-1, size)
        absmax = blocks.abs().amax(1, keepdim=True)
        return codebook.lloyd_max((blocks / absmax).flatten(), absmax.square().expand_as(blocks).flatten())

    for settings, size, gap in (({}, 64, 0.001), ({"outliers": 2}, 4096, None), ({"skew": 0.8}, 4096, None)):
        w = pictures.explorer_weights(**settings)
        least, stopped = (pictures.relative_error(w, levels, size) for levels in (pictures.least_error_levels(w, size), lloyd(w, size)))
        assert least <= stopped * (1 + 1e-4)
        assert stopped < least * (1 + gap) if gap else stopped > 1.1 * least
    e3m0 = torch.tensor([0, 0.25, 0.5, 1, 2, 4, 8, 16]) / 16                  # the best of the five in the chapter's table
    e3m0 = torch.cat([-e3m0.flip(0)[:-1], e3m0])
    w = pictures.explorer_weights(1.0, outliers=2)
    assert pictures.relative_error(w, pictures.least_error_levels(w, 4096), 4096) < pictures.relative_error(w, e3m0, 4096)


def test_the_closing_tables_verdicts_are_computed():
    table = SOURCE.split("table = [")[1].split("\n]\n")[0]
    rows = re.split(r"(?m)^    \(", table)[3:]                                # after what is before, the head and its line
    assert len(rows) == 16 and all("verdict(" in row for row in rows)


def test_the_relative_error_is_that_of_the_library():
    w = torch.randn(64 * 100, generator=torch.Generator().manual_seed(1))
    ours = pictures.relative_error(w, codebook.NF4_CODE, 64)
    assert ours == pytest.approx(((nf4.quantize_nf4(w).dequantize() - w).norm() / w.norm()).item(), rel=1e-5)


def test_figures_draw(tmp_path):
    names = pictures.TYPES
    figures = [
        pictures.rounding_picture([0.1, -0.2, 0.05], codebook.NF4_CODE.tolist()), pictures.codebook_figure(),
        pictures.ladders_figure({name: pictures.type_levels(name, pictures.explorer_weights(), 64).tolist() for name in names}),
        pictures.shares_figure({"a": [1 / 16] * 16, "b": [0.05] * 16}), pictures.bits_picture([10, 0, 7, 12]),
        pictures.budget_figure({"NF4": {"codes": 4, "absmax": 0.5}, "double": {"codes": 4, "8 bits": 0.125, "rest": 0.002}}),
        pictures.block_size_figure({"x": [0.1, 0.2]}, [32, 64], [5, 4.5]),
        pictures.types_figure({"normal": dict.fromkeys(names, 0.1)}),
        pictures.loss_figure({"base": dict.fromkeys(names, [2.5, 2.6])}, {"base": 2.4}), pictures.histogram_figure(),
    ]
    for number, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 4_000
    drawn = {text.get_text() for text in pictures.bits_picture([10, 0, 7, 12]).findobj(lambda a: hasattr(a, "get_text"))}
    assert {"byte 160 = 0xA0 = 16 · 10 + 0", "byte 124 = 0x7C = 16 · 7 + 12"} <= drawn
    with pytest.raises(ValueError, match="even number"):
        pictures.bits_picture([1, 2, 3])
