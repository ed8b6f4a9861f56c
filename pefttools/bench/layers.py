"""One adapted layer, forward and backward: ours against peft (and bitsandbytes), and against the bare frozen linear.

    x [512, d_in] requires a gradient;  y = layer(x);  gradients of x and of everything trained, for a fixed dL/dy

The adapters hold the same numbers on both sides, and the output and the gradient of x are compared before the clock
starts: a row that differs by more than rounding is reported as missing, not as fast.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pefttools.bench import production
from pefttools.bench.harness import QUICK, Effort, attempt, compare, interleave
from pefttools.bench.memory import peak_bytes

TOKENS = 512
EACH = Effort(seconds=2.0)       # of the processes that measure a row
SHAPES = [(2048, 2048, 16), (2048, 512, 16), (2048, 8192, 16), (256, 256, 8), (256, 1024, 8)]   # d_in, d_out, r
DTYPES = (torch.float32, torch.bfloat16)
KINDS = {"lora": "LoRA", "dora": "DoRA", "qlora": "QLoRA"}
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}     # largest difference / largest entry, of y and of dL/dx


def name_of(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def bound(kind: str, d_in: int, dtype: torch.dtype) -> float:
    """The issue's: at most peft's time at the 1B shapes (1.2 × for QLoRA in bfloat16), at most 0.85 × at width 256."""
    if d_in == 256:
        return 0.85
    return 1.2 if kind == "qlora" and dtype == torch.bfloat16 else 1.0


def layers(kind: str, d_in: int, d_out: int, r: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    """{"ours": …, "peft": …, "frozen": the bare linear}, with the same weights."""
    generator = torch.Generator().manual_seed(0)
    dense = nn.Linear(d_in, d_out, bias=False)
    dense.weight.data.normal_(0, 0.02, generator=generator)
    dense = dense.to(dtype).requires_grad_(False)
    theirs, adapter = production.layer(production.linear4bit(dense) if kind == "qlora" else _copy(dense), r,
                                       dora=kind == "dora")
    return {"ours": ours(kind, _copy(dense), r, adapter), "peft": theirs, "frozen": dense}


def _copy(dense: nn.Linear) -> nn.Linear:
    copy = nn.Linear(dense.in_features, dense.out_features, bias=False, device="meta")
    copy.weight = nn.Parameter(dense.weight.detach().clone(), requires_grad=False)
    return copy


def ours(kind: str, dense: nn.Linear, r: int, adapter: dict[str, Tensor]) -> nn.Module:
    """Our layer with the numbers of peft's adapter in it."""
    if kind == "dora":
        from pefttools.dora import DoRAConfig as Config
    else:
        from pefttools.lora import LoRAConfig as Config
    if kind == "qlora":
        from pefttools.qlora import NF4Linear

        dense = NF4Linear(dense, double_quant=True, compute_dtype=dense.weight.dtype)
    layer = Config(r=r, alpha=r).build(dense, torch.Generator().manual_seed(0))
    layer.read_file_tensors("default", adapter)
    for parameter in layer.adapter_parameters("default").values():
        parameter.requires_grad_(True)
    return layer.train()


def step(layer: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """A callable: forward, and the gradients of x and of what is trained; it returns (y, dL/dx, …)."""
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def run() -> tuple[Tensor, ...]:
        y = layer(x)
        return y, *torch.autograd.grad(y, wanted, gradient)

    return run


def eager(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same without the compiled NF4 kernels, as on a machine that has no compiler."""
    from pefttools import nf4_compiled

    def run_eager() -> Any:
        before = nf4_compiled.in_use()
        nf4_compiled.use(False)
        try:
            return run()
        finally:
            nf4_compiled.use(before)

    return run_eager


def agree(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], tolerance: float) -> float:
    """Largest difference of y and dL/dx over the largest entry. Raises ValueError where it exceeds `tolerance`."""
    worst = max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in zip(ours[:2], theirs[:2]))
    if not worst <= tolerance:
        raise ValueError(f"the two sides differ by {worst:.1e} of the largest entry, more than {tolerance:.0e}: they "
                         f"do not compute the same, so their times are not compared")
    return worst


def rows(kind: str, quick: bool = False) -> Iterator[dict[str, Any]]:
    """The groups "lora", "dora" and "qlora"."""
    effort: Effort = QUICK if quick else EACH
    for d_in, d_out, r in SHAPES[-2:] if quick else SHAPES:
        for dtype in DTYPES:
            yield from _shape(kind, d_in, d_out, r, dtype, effort)


def _shape(kind: str, d_in: int, d_out: int, r: int, dtype: torch.dtype, effort: Effort) -> Iterator[dict[str, Any]]:
    row = f"{d_in}→{d_out} {name_of(dtype)}, r={r}"
    found: list[dict[str, Any]] = []

    def measure() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(TOKENS, d_in, generator=generator).to(dtype).requires_grad_()
        gradient = torch.randn(TOKENS, d_out, generator=generator).to(dtype)
        ways = {name: step(layer, x, gradient) for name, layer in layers(kind, d_in, d_out, r, dtype).items()}
        difference = agree(ways["ours"](), ways["peft"](), CLOSE[dtype])
        peaks = {name: peak_bytes(way) for name, way in ways.items()}
        if kind == "qlora":
            ways["ours, eager"] = eager(ways["ours"])
        times = interleave(ways, effort)
        beside = {f"{name} / frozen": times.ratio(name, "frozen").median for name in ("ours", "peft")}
        if kind == "qlora":
            found.append(compare(row, times, "ours, eager", "peft", bound(kind, d_in, dtype)))
        return compare(row, times, "ours", "peft", bound(kind, d_in, dtype), difference=difference,
                       beside={**beside, "peak memory, ours / peft": peaks["ours"] / peaks["peft"]})

    empty = {"row": row, "what": "ours / peft", "unit": "×", "sense": "≤", "bound": bound(kind, d_in, dtype)}
    yield attempt(empty, measure)
    yield from found
