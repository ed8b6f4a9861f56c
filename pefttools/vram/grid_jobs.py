"""The configurations of the grid: models × methods × libraries × sizes × checkpointing × attention × optimizers.

Each group varies what its name says and keeps the rest. Presets are taken as they are, at all their layers.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pefttools.vram.job import METHODS, OPTIMIZERS, Job

LORA_KINDS = ("lora", "qlora", "dora", "qdora")
NOT_IN_PEFT = ("full", "bottleneck")
PLACEMENTS = ("houlsby", "pfeiffer", "bapna", "parallel", "input", "output", "input_output")


def grid() -> list[tuple[str, Job]]:
    """[(group, job)], each job once."""
    found: dict[str, tuple[str, Job]] = {}
    for group, fields in _all():
        job = Job(**fields)
        found.setdefault(key(job), (group, job))
    return list(found.values())


def key(job: Job) -> str:
    """The job in words: what differs from the defaults."""
    default = Job("")
    parts = [str(job.model), job.method]
    for name in ("library", "batch", "seq", "checkpointing", "attention", "padded", "optimizer", "accumulate", "dtype",
                 "gpu", "r", "targets", "options", "quantization", "keep_outputs"):
        value = getattr(job, name)
        if name == "quantization" and value == job.but(method=job.method).quantization:
            continue
        if value != getattr(default, name) or name in ("batch", "seq"):
            parts.append(f"{name}={value}" if not isinstance(value, bool) else name if value else f"no {name}")
    return " ".join(parts)


def _method(model: str, method: str, library: str = "pefttools", **fields: Any) -> dict[str, Any]:
    if method in LORA_KINDS and "targets" not in fields:
        fields["targets"] = "all-linear"
    if method == "llama_adapter":
        fields["options"] = {"layers" if library == "pefttools" else "adapter_layers": 4}
    return {"model": model, "method": method, "library": library, **fields}


def _all() -> Iterator[tuple[str, dict[str, Any]]]:
    yield from _methods()
    yield from _sizes()
    yield from _attention()
    yield from _optimizers()
    yield from _large()
    yield from _details()


def _methods() -> Iterator[tuple[str, dict[str, Any]]]:
    for model in ("tiny", "llama-3.2-1b", "qwen2.5-0.5b", "gpt2", "opt-125m", "gemma-2b"):
        for library in ("pefttools", "peft"):
            for method in METHODS:
                if library == "peft" and (method in NOT_IN_PEFT or method.startswith("q")):
                    continue
                if method == "llama_adapter" and (model.startswith(("opt", "gemma"))
                                                  or library == "peft" and model.startswith("qwen")):
                    continue
                if method == "ln_tuning" and model.startswith("opt"):
                    continue
                yield "methods and libraries", _method(model, method, library, batch=2, seq=512)


def _sizes() -> Iterator[tuple[str, dict[str, Any]]]:
    for model, longest in (("tiny", 1024), ("llama-3.2-1b", 2048), ("gpt2", 1024)):
        for method in ("full", "lora", "qlora"):
            for batch, seq in ((1, 128), (4, 512), (2, 2048), (8, 1024)):
                for checkpointing in (False, True):
                    if seq <= longest:
                        yield "batch, length, checkpointing", _method(model, method, batch=batch, seq=seq,
                                                                      checkpointing=checkpointing)


def _attention() -> Iterator[tuple[str, dict[str, Any]]]:
    for model, lengths in (("tiny", (256, 1024)), ("tinyllama-1.1b", (512, 2048)), ("gpt2", (256, 1024))):
        for seq in lengths:
            for method in ("full", "lora"):
                for checkpointing in (False, True):
                    for kind in ({"attention": "eager"}, {"attention": "flash"}, {"padded": True}):
                        yield "attention", _method(model, method, batch=2, seq=seq, checkpointing=checkpointing, **kind)


def _optimizers() -> Iterator[tuple[str, dict[str, Any]]]:
    for model in ("tiny", "gpt2", "llama-3.2-1b"):
        for optimizer in OPTIMIZERS:
            for method in ("full", "lora"):
                yield "optimizer", _method(model, method, batch=1, seq=256, optimizer=optimizer)


def _large() -> Iterator[tuple[str, dict[str, Any]]]:
    for model in ("llama-3.2-3b", "llama-2-7b", "llama-3.1-8b", "mistral-7b", "qwen2.5-7b", "gemma-7b", "gemma-3-1b",
                  "opt-6.7b", "gpt2-medium"):
        seq = 1024 if model.startswith("gpt2") else 2048
        yield "large models", _method(model, "lora", batch=1, seq=seq, targets=None)
        yield "large models", _method(model, "qlora", batch=4, seq=seq, checkpointing=True)
    yield "large models", _method("gemma-2-2b", "lora", batch=1, seq=1024, attention="eager")
    yield "large models", _method("gemma-2-2b", "full", batch=1, seq=1024, attention="eager", checkpointing=True)
    yield "large models", _method("llama-2-7b", "full", batch=1, seq=2048, checkpointing=True)
    yield "large models", _method("llama-2-13b", "qlora", batch=1, seq=2048, checkpointing=True)
    for model in ("llama-2-70b", "llama-65b"):
        yield "large models", _method(model, "qlora", batch=1, seq=1024, checkpointing=True, targets=None)
    yield "large models", _method("gpt-3-175b", "lora", batch=1, seq=1024, r=4, targets=None)


def _details() -> Iterator[tuple[str, dict[str, Any]]]:
    group = "ranks, targets, placements, dtypes"
    for r in (4, 64, 256):
        for targets in (None, ("gate_proj", "up_proj", "down_proj")):
            yield group, _method("llama-3.2-1b", "lora", batch=4, seq=512, r=r, targets=targets)
    for placement in PLACEMENTS:
        yield group, _method("tiny", "bottleneck", batch=4, seq=512, options={"placement": placement})
    for library, name in (("peft", "lora_dropout"), ("pefttools", "dropout")):
        yield group, _method("tiny", "lora", library, batch=4, seq=512, options={name: 0.05})
    yield group, _method("llama-3.2-1b", "lora", batch=2, seq=512, options={"layers_to_transform": [14, 15]},
                         targets=("q_proj", "v_proj"))
    for method in ("full", "lora", "dora"):
        yield group, _method("tiny", method, batch=4, seq=512, dtype="float32")
        yield group, _method("tinyllama-1.1b", method, batch=1, seq=512, dtype="float16", gpu="t4")
    for method in ("full", "lora"):
        yield group, _method("gpt2", method, batch=2, seq=512, accumulate=2)
        yield group, _method("llama-3.2-1b", method, batch=2, seq=512, keep_outputs=False)
        yield group, _method("tiny", method, batch=2, seq=512, accumulate=4, checkpointing=True)
    yield group, _method("llama-3.2-1b", "lora", batch=4, seq=512, quantization="nf4")
    yield group, _method("tinyllama-1.1b", "dora", "peft", batch=2, seq=512, checkpointing=True)
