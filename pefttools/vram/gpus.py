"""GPUs that people fine-tune on: what is sold, what is left of it, and which attention kernels exist there.

    sold "24 GB"  ─ chips hold 24 GiB ─►  ECC and the driver take theirs  ─►  total_memory: what torch reports, `usable`
                                                                                     │
                                                       a process takes a CUDA context out of that  ─►  `free_for_torch`

GDDR and HBM chips are made in powers of two, and "24 GB" on the box of a 3090 means 24 GiB of them. Where ECC is kept
inside the same chips (T4, L4, A10, L40S) it takes 1/16; a further 0.3 to 0.9 GiB is the driver's and the firmware's.
`usable` is `torch.cuda.get_device_properties(0).total_memory`, to the 0.01 GiB that torch's out-of-memory message
prints, from a message or a deviceQuery that somebody published (`source`). It moves by some 0.2 GiB between driver
versions (T4: 14.56 to 14.76; A10: 21.99 to 22.18); of several figures the smaller is taken.

**CUDA context.** No counter of torch shows it, nvidia-smi does. It holds the driver's structures for each
multiprocessor (local memory, printf and malloc heaps) and the code of the kernels that were loaded; since CUDA 11.7 a
kernel is loaded when it is first used, so that it grows with what a program calls. Its range here, for one process:

    least = 250 MiB + 1.0 MiB for each multiprocessor     context, lazy loading, cuBLAS and a few dozen kernels
    most  = 400 MiB + 3.5 MiB for each multiprocessor     the same with cuDNN, flash attention, bitsandbytes' kernels

which holds what is reported: about 300 MiB for a first tensor (pytorch/pytorch#107667, #20532: 300–400 MB), 0.7 to 1 GB
with all kernels of a build (pytorch/pytorch#28394, 80 multiprocessors; #107667). `context` is the middle of the range:
nobody knows it better without that machine. cuBLAS's workspace is not in it: torch allocates that itself, so that it is
in max_memory_allocated (`cublas_workspace`; aten/src/ATen/cuda/CublasHandlePool.cpp).
"""
from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from pefttools.vram.units import GiB, KiB, MiB, gib, parse_bytes


@dataclass(frozen=True)
class GPU:
    """One kind of GPU. Bytes are bytes; `sold` is what the data sheet prints."""

    name: str
    sold: str
    usable: int                      # torch.cuda.get_device_properties(0).total_memory
    capability: tuple[int, int]      # compute capability
    multiprocessors: int
    source: str                      # of `usable`

    @property
    def bf16(self) -> bool:
        """Whether its tensor cores compute in bfloat16 (from 8.0, Ampere). On a T4 torch emulates it, slowly."""
        return self.capability >= (8, 0)

    @property
    def flash(self) -> bool:
        """Whether torch's flash attention runs there (from 8.0); otherwise the memory-efficient or the math kernel."""
        return self.capability >= (8, 0)

    @property
    def context_range(self) -> tuple[int, int]:
        """(least, most) bytes of one process's CUDA context; see the module's docstring."""
        return (round(250 * MiB + 1.0 * MiB * self.multiprocessors),
                round(400 * MiB + 3.5 * MiB * self.multiprocessors))

    @property
    def context(self) -> int:
        """The middle of `context_range`."""
        return sum(self.context_range) // 2

    @property
    def cublas_workspace(self) -> int:
        """Bytes that torch allocates for cuBLAS at the first matrix product and never gives back."""
        return cublas_workspace(self.capability)

    @property
    def free_for_torch(self) -> int:
        """What torch.cuda.memory_reserved() can grow to: usable, less the context."""
        return self.usable - self.context

    def __str__(self) -> str:
        return f"{self.name} ({self.sold}: {gib(self.usable, 2)} usable)"


def cublas_workspace(capability: tuple[int, int]) -> int:
    """32 MiB from compute capability 9.0 on; before, CUBLAS_WORKSPACE_CONFIG's default :4096:2:16:8 = 8.125 MiB."""
    return 4096 * 8 * KiB if capability >= (9, 0) else 4096 * 2 * KiB + 16 * 8 * KiB


def _gib(value: float) -> int:
    return int(value * GiB)


DEFAULT = "a100-40"                  # where a job names no GPU: flash attention, context and workspace as there
GPUS: dict[str, GPU] = {gpu.name.lower().replace(" ", "-"): gpu for gpu in (
    GPU("T4", "16 GB", _gib(14.56), (7, 5), 40, "out-of-memory message, AlphaGPU/leetgpu-challenges#52; nvidia-smi "
        "15360 MiB, modal-labs/modal-client#2797"),
    GPU("L4", "24 GB", 23_583_784_960, (8, 9), 58, "deviceQuery, bottlerocket-os/bottlerocket-kernel-kit#139; "
        "nvidia-smi 23034 MiB, modal-labs/modal-client#2797"),
    GPU("RTX 3090", "24 GB", 24_259 * MiB, (8, 6), 82, "_CudaDeviceProperties(name='NVIDIA GeForce RTX 3090', "
        "total_memory=24259MB), printed in public code; nvidia-smi 24576 MiB, noonghunna/club-3090#390"),
    GPU("RTX 4090", "24 GB", _gib(23.64), (8, 9), 128, "out-of-memory message, 3DTopia/Phidias-Diffusion#8; nvidia-smi "
        "24564 MiB, RLinf/RLinf#255"),
    GPU("A10", "24 GB", _gib(21.99), (8, 6), 72, "out-of-memory message, zai-org/CogVLM#236; nvidia-smi 23028 MiB, "
        "modal-labs/modal-client#2797"),
    GPU("L40S", "48 GB", _gib(44.53), (8, 9), 142, "out-of-memory message, Wan-Video/Wan2.1#205; nvidia-smi 46068 MiB, "
        "modal-labs/modal-client#2797"),
    GPU("A100-40", "40 GB", 42_298_834_944, (8, 0), 108, "deviceQuery, bottlerocket-os/bottlerocket#3873"),
    GPU("A100-80", "80 GB", _gib(79.25), (8, 0), 108, "out-of-memory message, HiDream-ai/VAREdit#6; nvidia-smi 81920 "
        "MiB, modal-labs/modal-client#2797"),
    GPU("H100", "80 GB", _gib(79.11), (9, 0), 132, "out-of-memory message, vllm-project/vllm#27508; nvidia-smi 81559 "
        "MiB, modal-labs/modal-client#2797"),
    GPU("H200", "141 GB", _gib(139.72), (9, 0), 132, "the smaller of the out-of-memory messages that public "
        "repositories quote (139.72 to 139.81 GiB)"),
)}
_ALIASES = {"3090": "rtx-3090", "4090": "rtx-4090", "a10g": "a10", "a100": "a100-40", "teslat4": "t4",
            "a100sxm440gb": "a100-40", "a100sxm480gb": "a100-80", "a100pcie40gb": "a100-40", "a10040gb": "a100-40",
            "a10080gb": "a100-80", "h10080gb": "h100", "h10080gbhbm3": "h100", "h100pcie": "h100"}


def find_gpu(name: str | GPU) -> GPU:
    """The GPU of this name, however it is written: "t4", "rtx 4090", "NVIDIA A100-SXM4-80GB", "a100 80gb".

    Raises ValueError for an unknown one, with the nearest names. "a100" alone is the one of 40 GB.
    """
    if isinstance(name, GPU):
        return name
    plain = re.sub(r"[^a-z0-9]", "", str(name).lower())
    short = re.sub(r"[^a-z0-9]", "", re.sub(r"\b\d+ ?gb\b", "", str(name).lower()))
    plain = re.sub(r"^(nvidia)?(geforce|tesla)?", "", plain)
    keys = {key.replace("-", ""): key for key in GPUS} | _ALIASES
    found = keys.get(plain) or keys.get(re.sub(r"(hbm3e?|pcie|sxm\d?)", "", plain)) \
        or keys.get(re.sub(r"^(nvidia)?(geforce|tesla)?", "", short))
    if found is None:
        near = [keys[each] for each in difflib.get_close_matches(plain, keys, n=3, cutoff=0.5)]
        hint = f" Did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""
        raise ValueError(f"gpu={name!r} is not known.{hint} There are {', '.join(GPUS)}; for another one, give its "
                         f"memory: \"24GiB\".")
    return GPUS[found]


def memory_of(gpu: str | int | GPU) -> int:
    """Bytes that torch can reserve on this GPU; or of an amount such as "24GiB", which is taken as it is.

    Raises ValueError for a GPU that does not exist, or an amount without a unit that says which.
    """
    if isinstance(gpu, GPU):
        return gpu.free_for_torch
    if isinstance(gpu, int) or re.fullmatch(r"\s*[\d.,_]+\s*[kmgt]i?b?\s*", str(gpu), re.IGNORECASE):
        return parse_bytes(gpu)
    return find_gpu(gpu).free_for_torch
