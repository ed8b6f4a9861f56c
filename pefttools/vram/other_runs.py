"""The published runs of litgpt, torchtune, LLaMA-Factory and Unsloth: what each was as a Job, and what differs there.

    recipe("116")  ──►  Recipe(job, world, path, commit)  ──►  .simulate()  ──►  Memory
                        or Recipe(why=…): the row does not state enough, or is another program

The fields come from the rows' own sources, looked up file by file (published/other_runs.json: path and commit each).
None of these programs is transformers' Trainer, and a job says what transformers' model class with peft or pefttools
takes. What is put in the place of ours, because it decides the peak, is the head and the loss (`HEADS`); what else
differs stands in `WORLDS`, in words, and whether it is modelled.

    transformers   logits e·V, in float32 4·V, log-probabilities 4·V, their gradient 4·V        (e + 12)·V a token
    litgpt LoRA    head and loss in chunks of 128 tokens, all in the model's 16 bits             2·e·V + a chunk
    litgpt full    the loss in chunks of 128 tokens, 16 bits; the head's gradient in one piece   3·e·V
    torchtune      head in 8 chunks, each upcast for its loss                                    (e + 4)·V + a chunk
    torchtune, plain: logits in float32, one cross entropy                                       (4 + 4 + 4)·V

Sources: litgpt/finetune/lora.py (01fe959c5f43: lm_head_chunk_size=128; "Memory used" is max_memory_allocated / 10⁹) and
litgpt.utils.chunked_cross_entropy; torchtune.modules.loss.CEWithChunkedOutputLoss (num_output_chunks = 8).
"""
from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pefttools.vram.job import Job
from pefttools.vram.memory import Memory
from pefttools.vram.units import GB, parse_bytes

# name → (which of our three figures is compared: "total", "reserved", "device"; what differs and is not modelled)
WORLDS = {
    "litgpt": ("total", "litgpt's own model class: queries, keys and values are one linear layer, so that they share "
               "one dropout; keys and values are repeated for all heads; the head is quantized too where the base is. "
               "Modelled: parameters, adapters' too, in bfloat16; a head that is never the embedding. bitsandbytes of "
               "that time: 4-bit rows come out far too low, and why is not settled. Every batch is as long as its "
               "longest text; the longest is taken at the limit, which texts need not reach. README: all runs are on "
               "one GPU"),
    "litgpt-full": ("total", "as above; AdamW's state in bfloat16, and 2 of the 16 passes that it accumulates"),
    "torchtune": ("total", "torchtune's own model class; packed rows with a block mask (flex attention); torch.compile "
                  "(rows 150 and 151), which fuses what lies between the matrix products: not modelled; fused AdamW: "
                  "modelled. \"Peak active\" is held against max_memory_allocated"),
    "torchtune-plain": ("total", "as above, without chunks"),
    "llama-factory": ("device", "what nvidia-smi shows, in whole GB: with the CUDA context, whose size is known to "
                      "some hundred MiB, and all that the allocator ever reserved; transformers of 2024, whose loss "
                      "held a further float32 copy of the logits"),
    "unsloth-hf": ("device", "the card's size is all that is published: the longest context that still fits, with "
                   "8-bit AdamW or another (not stated), by somebody else's search step; transformers of 2024"),
}


@dataclass(frozen=True)
class Recipe:
    """`job` with `world`, `path`, `commit` — or `why` there is none."""

    id: str
    job: Job | None = None
    model: str = ""
    world: str = ""
    path: str = ""
    commit: str = ""
    note: str = ""
    why: str = ""

    def simulate(self) -> Memory:
        """Raises ValueError where there is no job (`why`)."""
        if self.job is None:
            raise ValueError(f"row {self.id}: {self.why}")
        from pefttools.vram import simulator, skeleton

        model = skeleton.build(self.job)
        head = HEADS.get(self.world)
        if head is not None:
            head().into(model)
        return simulator.run(self.job, model)

    def compared(self, memory: Memory) -> int:
        """The figure of ours that is the published one's kind. torchtune's AdamW is the fused one, whose step takes
        nothing beside its state: there the moments of ours that are no step count."""
        if self.world.startswith("torchtune") and memory.timeline:
            return max(moment.total for moment in memory.timeline if moment.phase != "step")
        return int(getattr(memory, WORLDS[self.world][0]))


@functools.cache
def _facts() -> dict[str, Any]:
    return json.loads((files("pefttools.vram") / "published" / "other_runs.json").read_text(encoding="utf-8"))


def recipe(row: str | int) -> Recipe:
    """What is known of the row with this id. An unknown id has a `why`, too: nobody has looked at its source."""
    entry = _facts().get(str(row))
    if entry is None:
        return Recipe(str(row), why="its source has not been looked at; only PEFT's rows are found by their name")
    if "why" in entry:
        return Recipe(str(row), why=entry["why"])
    options = dict(entry["job"])
    name = options["model"]
    if entry["world"].startswith("litgpt"):
        options["model"] = _untied(name)
    if isinstance(options.get("targets"), list):
        options["targets"] = tuple(options["targets"])
    return Recipe(str(row), Job(**options), name, entry["world"], entry["path"], entry["commit"], entry.get("note", ""))


def _untied(name: str) -> Any:
    """The configuration with a head of its own: litgpt's GPT has one, also where the model's embedding is its head."""
    from pefttools.vram.presets import config_of

    config = copy.deepcopy(config_of(name))
    config.tie_word_embeddings = False
    return config


def published_bytes(row: dict[str, str]) -> int:
    """The measurement of a CSV row in bytes: its value in its own unit."""
    value = float(row["peak_value"])
    return round(value * GB) if row["unit"] == "GB" else parse_bytes(f"{value} {row['unit']}")


# ------------------------------------------------------------------------------------------------ heads and losses

class _Later(nn.Module):
    """In the head's place: passes the last hidden states on, for a loss that multiplies chunk by chunk."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return x


@dataclass
class Head:
    """Logits and loss of another program. `size`: tokens of a chunk, or `parts`: into how many the row is cut."""

    size: int = 0
    parts: int = 0
    upcast: bool = False              # each chunk to float32
    inside: bool = True               # the head is applied chunk by chunk as well
    held: list[Tensor] = field(default_factory=list)      # the script's own variable: logits live until the next batch

    def into(self, model: nn.Module) -> None:
        """Put this head and loss in the place of the model's. GELU becomes torch's own kernel, which all of them use
        (transformers' gelu_new is seven operations, each with a result that waits for the backward pass)."""
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        for module in list(base.modules()):
            for name, child in module.named_children():
                if type(child).__name__ == "NewGELUActivation":
                    setattr(module, name, nn.GELU(approximate="tanh"))
        if self.inside:
            name = next(name for name, module in base.named_children() if module is base.get_output_embeddings())
            later = _Later(base.get_output_embeddings())
            setattr(base, name, later)
            base.loss_function = functools.partial(self.loss, later.head)
        else:
            base.loss_function = functools.partial(self.loss, None)

    def loss(self, head: nn.Module | None, logits: Tensor, labels: Tensor, vocab_size: int = 0, **_: Any) -> Tensor:
        """logits: [B, T, V], or with a head [B, T, h]."""
        self.held.clear()
        targets = F.pad(labels, (0, 1), value=-100)[..., 1:]
        size = self.size or -(-logits.shape[1] // self.parts)
        losses = []
        for piece, target in zip(logits.split(size, 1), targets.split(size, 1)):
            words = head(piece) if head is not None else piece
            self.held.append(words)
            rows = words.reshape(-1, words.shape[-1])
            losses.append(F.cross_entropy(rows.float() if self.upcast else rows, target.reshape(-1), reduction="none",
                                          ignore_index=-100))
        return torch.cat(losses).sum() / max(1, labels.numel())


HEADS: dict[str, Callable[[], Head]] = {
    "litgpt": lambda: Head(size=128),
    "litgpt-full": lambda: Head(size=128, inside=False),
    "torchtune": lambda: Head(parts=8, upcast=True),
    "torchtune-plain": lambda: Head(parts=1, upcast=True),
}
