"""N tasks to serve: N adapters on one base, or N whole models?

    adapters    [ base ][a₁][a₂] … [a_N]        GPU and disk: base + N·a       a switch: nothing moves, another aᵢ acts
    copies      [ base₁ ][ base₂ ] … [ base_N ] GPU and disk: N·base           all loaded: nothing moves
    one copy    [ baseᵢ ]                       GPU: base, disk: N·base        a switch loads a whole model

Worked number: Llama-3.1-8B in bfloat16 is 16.06 GB; LoRA of rank 16 on q and v has 6,815,744 parameters, 27.3 MB in
float32. 20 tasks: 16.6 GB as adapters, 321 GB as merged copies; a switch from disk moves 27.3 MB or 16.06 GB.

An adapter over a 4-bit base is either served on it, or merged into the 16-bit weights (merging into 4-bit codes rounds
again and changes the outputs). Bottlenecks, prefixes and prompts cannot be merged into weights at all. KV cache and
activations of serving are beside this: they are the same for all, but for a prefix's own keys and values.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pefttools.vram.job import DTYPES, Job
from pefttools.vram.memory import Memory
from pefttools.vram.units import gb, human

UNMERGEABLE = {"bottleneck", "prompt", "ptuning", "prefix", "llama_adapter"}


@dataclass(frozen=True)
class Serving:
    """One way to serve `tasks` tasks; bytes. `switch`: what has to be copied to the GPU to answer for another task."""

    way: str                # "adapters on one base", "a copy for each task", "one copy at a time"
    tasks: int
    gpu: int
    disk: int
    switch: int

    def __str__(self) -> str:
        moved = "nothing moves" if not self.switch else f"{human(self.switch, decimal=True)} move"
        return f"{self.way}: {gb(self.gpu)} on the GPU, {gb(self.disk)} on disk, {moved} at a switch"

    def to_dict(self) -> dict[str, Any]:
        return {"way": self.way, "tasks": self.tasks, "gpu_bytes": self.gpu, "disk_bytes": self.disk,
                "switch_bytes": self.switch}


def serving(job: Job, memory: Memory, tasks: int = 1) -> tuple[Serving, ...]:
    """The ways to serve `tasks` results of this job, fewest bytes on the GPU first (then at a switch, then on disk).

    `memory`: of the job on one GPU (a shard's weights would be a part of the model). ValueError for tasks below 1.
    """
    if isinstance(tasks, bool) or not isinstance(tasks, int) or tasks < 1:
        raise ValueError(f"tasks={tasks!r}: the number of tasks to serve, at least 1.")
    plain = (memory.parameters if job.method == "full" else memory.parameters - memory.trainable) * DTYPES[job.dtype]
    ways = []
    if job.method != "full":
        base, adapter = (
            memory.terms["weights"] + memory.terms.get("constants", 0),
            memory.trainable * DTYPES[job.adapter_dtype],
        )
        ways.append(Serving("adapters on one base", tasks, base + tasks * adapter, base + tasks * adapter, 0))
    if job.method not in UNMERGEABLE:
        merged = "" if job.method == "full" else "merged "
        ways.append(Serving(f"a {merged}copy for each task", tasks, tasks * plain, tasks * plain, 0))
        if tasks > 1:
            ways.append(Serving(f"one {merged}copy at a time", tasks, plain, tasks * plain, plain))
    return tuple(sorted(ways, key=lambda way: (way.gpu, way.switch, way.disk)))


def fits_by(ways: tuple[Serving, ...], usable: int) -> Serving:
    """The way to take on a GPU of `usable` bytes: of those that fit the smallest switch, then the fewest bytes."""
    fitting = [way for way in ways if way.gpu <= usable]
    return min(fitting, key=lambda way: (way.switch, way.gpu, way.disk)) if fitting else ways[0]


def resident(ways: tuple[Serving, ...]) -> int:
    """Bytes on the GPU to answer for every task without loading anything: the least of the ways without a switch."""
    return min(way.gpu for way in ways if not way.switch)
