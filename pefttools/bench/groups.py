"""The groups of the benchmark: what each measures, where its rows come from, and how it is told on the page."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Group:
    """`place`: "module:function" of pefttools.bench; called with quick=…, and `arguments` before it. `threads`: None
for every number that was asked for, else the numbers for which the group runs."""

    name: str
    title: str
    place: str
    prose: str
    threads: tuple[int, ...] | None = None
    arguments: tuple[Any, ...] = ()
    children: bool = False      # it measures in further processes, which may use any file of the library
    processes: int = 1          # it is run so many times, and the rounds of all are one

    def rows(self, quick: bool) -> Iterator[dict[str, Any]]:
        module, _, function = self.place.partition(":")
        call: Callable[..., Iterator[dict[str, Any]]] = getattr(import_module(f"pefttools.bench.{module}"), function)
        return call(*self.arguments, quick=quick)


LAYER = """512 tokens; forward, and the gradients of the input and of all that trains. Both sides hold the same numbers,
and output and input gradient are compared before the clock starts. “frozen” is the bare linear layer that trains
nothing: the floor. Rounds of three processes are taken together."""

GROUPS = {group.name: group for group in (
    Group("quantize", "NF4: quantize", "quantization:quantize_rows",
          """Against `bitsandbytes.functional.quantize_4bit`, blocks of 64. Codes and scales were equal byte for byte
in the same run, or there is no figure. “Compiled” is C, which the library builds by itself, in half a second that is
not in these times, once a process has quantized some 67 million weights and there is a compiler."""),
    Group("dequantize", "NF4: dequantize", "quantization:dequantize_rows",
          """Against `bitsandbytes.functional.dequantize_4bit`, which always makes a new tensor; ours can also write
into one that is there. “Ours” is what a call without further arguments does on a machine with a C compiler, once the
kernels are built; “eager” is what it does without one, held to the same bound. The distance to a memory copy: `clone`
makes a new tensor, `copy_` fills an old one, of the dequantized size. The dequantized weights were equal bit for bit in
the same run. How fast a new tensor is filled depends on where the process finds its memory, so the rounds of five
processes are taken together.""", processes=5),
    Group("lora", "A LoRA layer", "layers:rows", f"Against peft's LoRA linear. {LAYER}", arguments=("lora",),
          processes=3),
    Group("dora", "A DoRA layer", "layers:rows", f"Against peft's DoRA linear. {LAYER}", arguments=("dora",),
          processes=3),
    Group("qlora", "A QLoRA layer", "layers:rows",
          f"""Against peft's LoRA on bitsandbytes' `Linear4bit` (NF4, double quantization, its CPU faults worked
around). “Ours, eager” is without the NF4 kernels in C, as on a machine that has no compiler. {LAYER}""",
          arguments=("qlora",), processes=3),
    Group("step", "A training step of the bundled model", "step:rows",
          """8 rows of 128 tokens, float32: forward, backward, AdamW; adapters of rank 16 on every linear layer.
“full” is full fine-tuning. Peak memory is what a step allocates at most over what lay there before, by allocation
trace."""),
    Group("memory", "Memory kept for the backward pass", "layer_memory:rows",
          """By a trace of every allocation (`pefttools.bench.memory`), so exact and free of noise: bytes that the
autograd graph keeps, per token and decoder layer, bfloat16 at Llama-3.2-1B's shapes, the slope over three lengths
(which must agree) of the difference between two layers and one. Weights and what does not grow with the tokens drop
out. Attention is torch's flash kernel for CPUs, which saves q, k, v, the output and the logsumexp, as CUDA's does;
CUDA's math kernel would add a T × T matrix a head.""", threads=(1,)),
    Group("one_billion", "A model of Llama-3.2-1B's shape, one QLoRA step", "one_billion_rows:rows",
          """Random weights, quantized to NF4 with double quantization, then one step of batch 1 × 128 with LoRA on
every linear layer. Each run is a process of its own; the ways take turns in rounds. Seconds: quantizing, the build of
the NF4 kernels within it, and the first step together. Peak memory is the operating system's figure for the whole process, imports and all.""", threads=(2, 4),
          children=True),
    Group("imports", "Imports", "imports:rows",
          """New Python processes in rounds of random order, files in the system's cache. A header is the imports of a
chapter's first cell, the start of Python and `import torch` included; the control is `import torch` less `import
torch`. The library's own modules are timed inside a process that has imported torch.""", threads=(1,), children=True),
)}
