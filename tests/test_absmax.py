"""pefttools.absmax against bitsandbytes' LLM.int8 quantizer, which runs on the CPU, and against its own error bound."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pefttools.absmax import dequantize_blockwise, dequantize_rowwise, error_bound, quantize_blockwise, quantize_rowwise

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def weights(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (16, 64), (129, 300)])
@pytest.mark.parametrize("threshold", [0.0, 2.5, 6.0])
def test_rowwise_is_bitsandbytes_in_every_bit(dtype, shape, threshold):
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    w = weights(*shape, dtype=dtype)
    w[0, 0] = 7.0                                          # an outlier at both thresholds
    before = w.clone()
    q, absmax, columns = quantize_rowwise(w, threshold)
    assert torch.equal(w, before)
    theirs, stats, their_columns = int8_vectorwise_quant(w.clone(), threshold)
    assert q.dtype == torch.int8 and absmax.dtype == torch.float32
    if shape == (1, 1) and threshold:                      # a row of zeros once the outlier is out: NaN there
        assert q.item() == 0
    else:
        assert torch.equal(q, theirs)
    assert torch.equal(absmax, stats)
    assert (columns is None) == (their_columns is None)
    if columns is not None:
        assert torch.equal(columns, their_columns)
    assert torch.equal(dequantize_rowwise(q, absmax), int8_vectorwise_dequant(q, absmax))


def test_outliers_kept_apart_give_back_the_product():
    """LLM.int8(): the columns with outliers in 16 bits, the rest in int8, added up, is close to the full product."""
    x, w = weights(8, 64, seed=1), weights(32, 64, seed=2, scale=0.1)
    x[:, 5] = 60.0
    q, absmax, columns = quantize_rowwise(x, 6.0)
    assert columns.tolist() == [5] and (q[:, 5] == 0).all()
    exact = x @ w.T
    apart = dequantize_rowwise(q, absmax) @ w.T + x[:, columns] @ w[:, columns].T
    together = dequantize_rowwise(*quantize_rowwise(x)[:2]) @ w.T
    assert (apart - exact).norm() < 0.1 * (together - exact).norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 4, 64, 100])
def test_blockwise_is_rowwise_of_the_blocks(dtype, block_size):
    w = weights(5, 320, dtype=dtype)
    q, absmax = quantize_blockwise(w, block_size)
    rows, row_absmax, _ = quantize_rowwise(w.reshape(-1, block_size))
    assert q.shape == w.shape and torch.equal(q.view(-1, block_size), rows) and torch.equal(absmax, row_absmax)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=st.lists(st.integers(1, 40), min_size=1, max_size=3), block_size=st.integers(1, 70),
       dtype=st.sampled_from(DTYPES), exponent=st.integers(-30, 30), seed=st.integers(0, 99))
def test_error_bound_holds(shape, block_size, dtype, exponent, seed):
    w = weights(*shape, seed=seed, scale=2.0 ** (exponent if dtype != torch.float16 else exponent / 5)).to(dtype)
    q, absmax = quantize_blockwise(w, block_size)
    back = dequantize_blockwise(q, absmax, block_size)
    assert back.shape == w.shape and q.abs().max() <= 127
    bound = error_bound(absmax).repeat_interleave(block_size)[:w.numel()].view(w.shape)
    assert ((back - w.float()).abs() <= bound * (1 + 1e-4)).all()     # q·(127/a) is rounded to float32 before round()
    assert torch.equal(back.to(dtype), dequantize_blockwise(q, absmax, block_size, dtype))


def test_the_bound_is_reached():
    w = torch.tensor([[127.0, 0.5, 1.4999]])
    q, absmax, _ = quantize_rowwise(w)
    assert q.tolist() == [[127, 0, 1]]                     # 0.5 is a tie, to even
    assert (dequantize_rowwise(q, absmax) - w).abs().max().item() == pytest.approx(error_bound(absmax).item(), rel=1e-6)


def test_the_picture_of_the_docstring():
    w = torch.tensor([[0.3, -1.2, 0.05, 0.61]])
    q, absmax, _ = quantize_rowwise(w)
    assert q.tolist() == [[32, -127, 5, 65]] and absmax.tolist() == pytest.approx([1.2])
    back = dequantize_rowwise(q, absmax)
    assert back[0].tolist() == pytest.approx([0.302, -1.2, 0.047, 0.614], abs=6e-4)
    assert (back - w).abs().max().item() == pytest.approx(0.004, abs=3e-4) and error_bound(absmax).item() < 0.00473


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-42, 3e38])
def test_extreme_rows(value):
    """Zeros give zeros; magnitudes at which 127/absmax over- or underflows float32 stay within the bound."""
    w = torch.full((2, 8), value) * torch.tensor([1, -1, 0.5, 0.25, 0, 1, 1, 1])
    for q, absmax in (quantize_rowwise(w)[:2], quantize_blockwise(w, 8)):
        assert q.abs().max() == (127 if value else 0)
        back = dequantize_blockwise(q, absmax, 8)
        bound = error_bound(absmax).unsqueeze(1) * 1.01 + 1e-43       # the smallest numbers are multiples of 1.4e-45
        assert ((back - w).abs() <= bound).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_refused_with_its_row(bad):
    w = weights(4, 8)
    w[2, 3] = bad
    with pytest.raises(ValueError, match="row or block 2"):
        quantize_rowwise(w)
    with pytest.raises(ValueError, match="row or block 4"):
        quantize_blockwise(w, 4)


def test_shapes_are_refused_or_empty():
    with pytest.raises(ValueError, match="rows, columns"):
        quantize_rowwise(torch.zeros(3))
    with pytest.raises(ValueError, match="rows, columns"):
        quantize_rowwise(torch.zeros(3, 3, dtype=torch.int8))
    with pytest.raises(ValueError, match="block_size"):
        quantize_blockwise(torch.zeros(3), 0)
    q, absmax = quantize_blockwise(torch.zeros(0, 4))
    assert q.shape == (0, 4) and absmax.shape == (0,) and dequantize_blockwise(q, absmax).shape == (0, 4)
    assert quantize_rowwise(torch.zeros(0, 4))[0].shape == (0, 4)


def test_takes_parameters_and_slices():
    w = torch.nn.Parameter(weights(8, 32))
    q, absmax, _ = quantize_rowwise(w[:, ::2])
    assert torch.equal(q, quantize_rowwise(w.detach()[:, ::2].contiguous())[0]) and not absmax.requires_grad
