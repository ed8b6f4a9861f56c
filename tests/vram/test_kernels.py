"""Which attention kernel CUDA takes, and what it keeps and takes."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pefttools.vram.kernels import CUDAKernels, choose, cublas_workspace
from pefttools.vram.ledger import FOREVER, Ledger
from pefttools.vram.sums import run_engine

A100, T4, L40S, H100 = (8, 0), (7, 5), (8, 9), (9, 0)


def qkv(B=2, H=4, T=64, d=32, kv=None, S=None, dtype=torch.bfloat16, grad=True):
    return [torch.empty(B, heads, length, d, dtype=dtype, device="meta", requires_grad=grad)
            for heads, length in ((H, T), (kv or H, S or T), (kv or H, S or T))]


@pytest.mark.parametrize("case, capability, kernel", [
    ({}, A100, "flash"), ({"kv": 2}, A100, "flash"), ({"dtype": torch.float32}, A100, "efficient"),
    ({"d": 320}, A100, "efficient"), ({"dtype": torch.float16}, T4, "efficient"),
    ({"dtype": torch.float16, "kv": 2}, T4, "math"), ({}, T4, "math"), ({"d": 12}, T4, "math"),
    ({"S": 80}, A100, "efficient"),
], ids=["usual", "grouped", "float32", "wide head", "T4", "T4 grouped", "T4 bfloat16", "T4 odd width", "prefix"])
def test_the_kernel_is_cudas(case, capability, kernel):
    assert choose(*qkv(**case), None, True, capability) == kernel


def test_a_mask_rules_flash_out():
    q, k, v = qkv()
    mask = torch.empty(2, 1, 64, 64, dtype=torch.bool, device="meta")
    assert choose(q, k, v, mask, False, A100) == "efficient"


def kept(mask=None, capability=A100, **case):
    """Bytes alive between forward and backward, beyond q, k, v and the result; and the most in backward."""
    q, k, v = qkv(**case)
    with Ledger() as ledger, CUDAKernels(capability):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        waiting = sum(life.bytes for life in ledger.lives if life.died == FOREVER) - out.numel() * out.element_size()
        ledger.begin("backward")
        run_engine(out.sum())
    return waiting, ledger


def test_flash_keeps_a_logsumexp_and_a_random_state():
    waiting, _ = kept()
    assert waiting == 4 * 2 * 4 * 64 + 16


def test_efficient_keeps_the_mask_in_numbers_padded_to_16_columns():
    mask = torch.empty(2, 1, 64, 70, dtype=torch.bool, device="meta")
    waiting, _ = kept(mask, S=70)
    assert waiting == 2 * 2 * 64 * 80 + 4 * 2 * 4 * 64


def test_math_keeps_the_square_matrix():
    kept_64, kept_128, kept_256 = (kept(capability=T4, T=T)[0] for T in (64, 128, 256))
    square = (kept_256 - 2 * kept_128) - (kept_128 - 2 * kept_64)    # linear parts cancel
    assert square >= 2 * 2 * 4 * (256 ** 2 - 3 * 128 ** 2 + 2 * 64 ** 2)


def test_flash_backward_sums_in_float32():
    _, ledger = kept()
    assert 4 * 2 * 128 * 4 * 32 in [life.bytes for life in ledger.lives if life.phase == "backward"]


def test_results_have_the_shape_and_layout_of_the_real_one():
    q, k, v = qkv(kv=2, grad=False)
    with CUDAKernels(A100):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert out.shape == q.shape and out.transpose(1, 2).is_contiguous()


def test_gradients_of_grouped_heads_have_the_groups_shape():
    q, k, v = qkv(kv=2)
    with CUDAKernels(A100):
        run_engine(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).sum())
    assert k.grad.shape == k.shape and q.grad.shape == q.shape


def test_dropout_keeps_one_byte_a_number():
    x = torch.empty(100, 10, device="meta", requires_grad=True)
    with Ledger() as ledger, CUDAKernels(A100):
        out = torch.nn.Dropout(0.1)(x)
    assert sorted(life.bytes for life in ledger.lives if life.died == FOREVER) == [1000, 4000] and out is not None


def test_outside_nothing_has_changed():
    q = torch.randn(1, 2, 4, 8)
    with CUDAKernels(A100):
        pass
    assert torch.isfinite(F.scaled_dot_product_attention(q, q, q)).all()


def test_autocast_casts_a_weight_once_and_products_come_out_in_16_bits():
    layer = torch.nn.Linear(8, 8, bias=False, device="meta")
    with CUDAKernels(A100, autocast=torch.bfloat16) as kernels, Ledger() as ledger:
        y = layer(layer(torch.empty(3, 8, device="meta")))
        kernels.forget()
    assert y.dtype == torch.bfloat16
    assert [life.shape for life in ledger.lives if life.op == "aten._to_copy.default"].count((8, 8)) == 1


@pytest.mark.parametrize("capability, mib", [(T4, 8.125), (L40S, 8.125), (H100, 32)], ids=["T4", "L40S", "H100"])
def test_cublas_workspace(capability, mib):
    assert cublas_workspace(capability) == mib * 2 ** 20
