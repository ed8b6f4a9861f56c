"""pefttools.codebook: each codebook against bitsandbytes' table, the paper's, or the theory of quantization."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch

from pefttools.codebook import (FP4_CODE, NF4_CODE, NF4_OFFSET, dynamic_codebook, fp4_codebook, int4_codebook,
                                lloyd_max, midpoints, nf4_codebook)

pytestmark = pytest.mark.usefixtures("one_thread")

# QLoRA, appendix E, as printed in the paper.
APPENDIX_E = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
              -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
              0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
              1.0]


@pytest.fixture(scope="module")
def blocks():
    """Normal weights in blocks of 64, their absmax, and the quotient."""
    w = torch.randn(1 << 15, 64, generator=torch.Generator().manual_seed(0))
    absmax = w.abs().amax(1, keepdim=True)
    return w, absmax, w / absmax


def relative_rmse(code, blocks):
    w, absmax, s = blocks
    levels = code.sort().values
    return ((levels[torch.bucketize(s, midpoints(levels))] * absmax - w).norm() / w.norm()).item()


def test_nf4_is_appendix_e_and_bitsandbytes_in_every_bit():
    from bitsandbytes.functional import get_4bit_type

    assert torch.equal(nf4_codebook(), torch.tensor(APPENDIX_E))
    assert torch.equal(NF4_CODE, get_4bit_type("nf4", device="cpu"))


def test_nf4_is_the_scaled_quantiles_of_the_paper():
    """Without the rounding of the probabilities to float32, the same formula in float64: 1e-7 away at most."""
    quantile = NormalDist().inv_cdf
    positive = [quantile(NF4_OFFSET + (0.5 - NF4_OFFSET) * i / 8) for i in range(8)]
    negative = [-quantile(NF4_OFFSET + (0.5 - NF4_OFFSET) * i / 7) for i in range(7)]
    exact = torch.tensor(sorted([*negative, 0.0, *positive]), dtype=torch.float64) / max(positive)
    difference = (exact - NF4_CODE.double()).abs().max().item()
    assert 1.0e-7 < difference < 1.1e-7
    assert int((exact.float() != NF4_CODE).sum()) == 10
    assert abs(1 - (1 / 32 + 1 / 30) / 2 - NF4_OFFSET) < 4e-8
    # the worked number of the docstring
    assert quantile(NF4_OFFSET) == pytest.approx(1.84813, abs=5e-6)
    assert quantile(0.9092448) == pytest.approx(1.33612, abs=5e-6)
    assert NF4_CODE[14].item() == pytest.approx(0.72296, abs=5e-6)


@pytest.mark.parametrize("offset", [0.5, 1.0, 2, -1])
def test_nf4_refuses_an_offset_without_quantile(offset):
    with pytest.raises(ValueError, match="offset"):
        nf4_codebook(offset)


def test_fp4_is_bitsandbytes_in_every_bit():
    from bitsandbytes.functional import get_4bit_type

    assert torch.equal(fp4_codebook(), get_4bit_type("fp4", device="cpu"))
    assert FP4_CODE[0b0011] == 1 and FP4_CODE[0b0001].item() == pytest.approx(0.0052, abs=1e-4)
    assert torch.equal(FP4_CODE[8:], -FP4_CODE[:8])


def test_int4_has_the_levels_of_bitsandbytes():
    code = int4_codebook()
    assert torch.equal(code, torch.tensor([-7, -6, -5, -4, -3, -2, -1, 0, 0, 1, 2, 3, 4, 5, 6, 7]) / 7)


def test_dynamic_is_bitsandbytes_in_every_bit():
    from bitsandbytes.functional import create_dynamic_map

    code = dynamic_codebook()
    assert torch.equal(code, create_dynamic_map(signed=True, max_exponent_bits=7, total_bits=8))
    assert len(code.unique()) == 256 and code[127] == 0 and code[255] == 1
    assert code[0].item() == pytest.approx(-0.99297, abs=1e-5)


def test_lloyd_max_on_a_normal_distribution_is_the_table_of_max():
    """Max 1960, table I: N = 16 has the levels below and a mean squared error of 0.009497; N = 2 and 4 too."""
    code = lloyd_max()
    table = torch.tensor([0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733])
    assert torch.allclose(code[8:], table, atol=6e-4)
    assert torch.allclose(code, -code.flip(0), atol=1e-5)
    assert lloyd_max(levels=2)[1].item() == pytest.approx(math.sqrt(2 / math.pi), abs=1e-5)
    assert torch.allclose(lloyd_max(levels=4)[2:], torch.tensor([0.4528, 1.510]), atol=1e-3)
    x = torch.linspace(-9, 9, 400_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    error = (x - code.double()[torch.bucketize(x, midpoints(code.double()))]).square()
    assert (error * density).sum().item() == pytest.approx(0.009497, abs=5e-6)


def test_lloyd_max_cannot_be_improved_by_moving_a_level(blocks):
    w, absmax, s = blocks
    code = lloyd_max(s, absmax.square().expand_as(s))
    best = relative_rmse(code, blocks)
    for i in range(16):
        for step in (-0.01, 0.01):
            moved = code.clone()
            moved[i] += step
            assert relative_rmse(moved, blocks) > best


def test_relative_errors_of_normal_weights_in_blocks_of_64(blocks):
    """The figures of the module's docstring."""
    w, absmax, s = blocks
    assert relative_rmse(NF4_CODE, blocks) == pytest.approx(0.0920, abs=2e-4)
    assert relative_rmse(int4_codebook(), blocks) == pytest.approx(0.1077, abs=3e-4)
    assert relative_rmse(FP4_CODE, blocks) == pytest.approx(0.1219, abs=4e-4)
    assert relative_rmse(lloyd_max(s, absmax.square().expand_as(s)), blocks) == pytest.approx(0.0874, abs=3e-4)


def test_lloyd_max_of_few_points_finds_them():
    points = torch.tensor([-1.0, -0.2, 0.5, 1.0])
    assert torch.allclose(lloyd_max(points.repeat(5), levels=4), points, atol=1e-6)


def test_lloyd_max_weights_count():
    """A point counted nine times is one that is there nine times."""
    x = torch.rand(200, generator=torch.Generator().manual_seed(1))
    weights = torch.where(torch.arange(200) < 50, 9.0, 1.0)
    repeated = torch.cat([x[:50].repeat(9), x[50:]])
    assert torch.allclose(lloyd_max(x, weights, levels=4), lloyd_max(repeated, levels=4), atol=1e-5)


def test_lloyd_max_refuses():
    with pytest.raises(ValueError, match="16 finite"):
        lloyd_max(torch.rand(15))
    with pytest.raises(ValueError, match="1 are not finite"):
        lloyd_max(torch.full((20,), 1.0).index_fill(0, torch.tensor([3]), math.nan))
    with pytest.raises(RuntimeError, match="max_steps"):
        lloyd_max(max_steps=2)
