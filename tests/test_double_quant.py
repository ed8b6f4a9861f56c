"""pefttools.double_quant against bitsandbytes' blockwise 8-bit quantizer on the CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pefttools.codebook import dynamic_codebook
from pefttools.double_quant import dequantize_8bit, dynamic_map, quantize_8bit

pytestmark = pytest.mark.usefixtures("one_thread")


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(1, 2000), exponent=st.integers(-120, 120), zero_block=st.booleans(), seed=st.integers(0, 99))
def test_is_bitsandbytes_in_every_bit(n, exponent, zero_block, seed):
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    x = torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    if zero_block:
        x[256:512] = 0
    codes, absmax = quantize_8bit(x)
    theirs, state = quantize_blockwise(x, blocksize=256)
    assert same(codes, theirs) and same(absmax, state.absmax) and same(dynamic_map(), state.code)
    assert same(dequantize_8bit(codes, absmax), dequantize_blockwise(theirs, state))


def test_every_point_of_the_interval():
    """A sweep of a million values from -1 to 1, and the neighbourhood of each boundary of bitsandbytes' table."""
    from bitsandbytes.functional import quantize_blockwise

    boundaries = -1 + 2 * (torch.arange(65536, dtype=torch.float64) - 0.5) / 65535
    near = boundaries.float()
    x = torch.cat([torch.linspace(-1, 1, 1 << 20), near, torch.nextafter(near, torch.tensor(2.0))])
    x[::256] = 1.0                                                       # so that every block is scaled by 1
    assert same(quantize_8bit(x)[0], quantize_blockwise(x, blocksize=256)[0])


def test_nearest_is_the_nearest_and_differs_where_the_docstring_says():
    absmax = torch.randn(1 << 14, 64, generator=torch.Generator().manual_seed(0)).abs().amax(1)
    x = absmax - absmax.mean()
    table, scale = quantize_8bit(x)
    nearest, _ = quantize_8bit(x, nearest=True)
    assert 0.0005 < (table != nearest).float().mean() < 0.005
    s = (x.view(-1, 256) / scale.unsqueeze(1)).view(-1, 1).double()
    assert torch.equal(nearest.long(), (s - dynamic_codebook().double()).abs().argmin(1))
    error = [(dequantize_8bit(codes, scale) - x).norm() for codes in (nearest, table)]
    assert error[0] <= error[1]


def test_zeros_and_nothing():
    codes, absmax = quantize_8bit(torch.zeros(300))
    assert not codes.any() and not absmax.any() and not dequantize_8bit(codes, absmax).any()
    codes, absmax = quantize_8bit(torch.zeros(0))
    assert codes.shape == absmax.shape == dequantize_8bit(codes, absmax).shape == (0,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="finite"):
        quantize_8bit(torch.tensor([1.0, bad]))
