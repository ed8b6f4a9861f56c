"""GPUs by any spelling; what is left of them; what they can do."""
from __future__ import annotations

import pytest

from pefttools.vram.gpus import GPUS, cublas_workspace, find_gpu, memory_of
from pefttools.vram.units import GB, GiB, MiB


@pytest.mark.parametrize("text, name", [
    ("t4", "T4"), ("Tesla T4", "T4"), ("T4 16GB", "T4"), ("a100-80", "A100-80"), ("NVIDIA A100-SXM4-80GB", "A100-80"),
    ("a100", "A100-40"), ("NVIDIA A100-SXM4-40GB", "A100-40"), ("rtx 4090", "RTX 4090"), ("4090", "RTX 4090"),
    ("NVIDIA GeForce RTX 3090", "RTX 3090"), ("A10G", "A10"), ("NVIDIA L4", "L4"), ("l40s", "L40S"),
    ("NVIDIA H100 80GB HBM3", "H100"), ("H200", "H200")], ids=str)
def test_found(text, name):
    assert find_gpu(text).name == name


def test_all_that_are_asked_for_are_there():
    assert [gpu.name for gpu in GPUS.values()] == [
        "T4", "L4", "RTX 3090", "RTX 4090", "A10", "L40S", "A100-40", "A100-80", "H100", "H200"]


@pytest.mark.parametrize("name", GPUS)
def test_usable_is_less_than_the_chips_and_has_a_source(name):
    gpu = GPUS[name]
    chips = int(gpu.sold.split()[0])
    assert 0.87 * chips * GiB < gpu.usable < chips * GiB                 # ECC and the driver take 1/16 to 1/8
    assert gpu.source
    least, most = gpu.context_range
    assert 250 * MiB < least < gpu.context < most < 1.3 * GiB
    assert gpu.free_for_torch == gpu.usable - gpu.context


def test_kernels():
    assert not find_gpu("t4").bf16 and not find_gpu("t4").flash
    assert all(gpu.bf16 and gpu.flash for gpu in GPUS.values() if gpu.name != "T4")
    assert cublas_workspace((8, 0)) == 8_519_680                         # what pytorch/pytorch#95668 finds allocated
    assert cublas_workspace((9, 0)) == 32 * MiB


@pytest.mark.parametrize("text, near", [("v100", "h100"), ("a1000", "a100"), ("rtx 4080", "rtx-4090"),
                                        ("h1000", "h100")])
def test_unknown_names_the_nearest(text, near):
    with pytest.raises(ValueError, match=f"is not known.*{near}"):
        find_gpu(text)


def test_memory_by_name_or_amount():
    assert memory_of("t4") == find_gpu("t4").free_for_torch
    assert memory_of("24GB") == 24 * GB and memory_of(24 * GiB) == 24 * GiB
    with pytest.raises(ValueError, match="24 GB or 24 GiB"):
        memory_of("24G")
    with pytest.raises(ValueError, match="is not known"):
        memory_of("gtx 1080")
