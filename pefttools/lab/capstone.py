"""Chapter 11: one task, every method, one table; on Llama-3.2-1B where there is a GPU, on the bundled model elsewhere.

    scale = scale_of(base)                        how many steps and rows, which rates: for a small and for a large base
    choice = plan_it(METHODS, …, predictor(…))    what fits, from `capstone_plan` or from the student
    rows = run_all(task, choice)                  one row a method, kept in a file as it ends: a stopped call goes on
    print(markdown(rows))                         the table, as the report wants it (capstone_table)

A `Task` is what all methods share: base, rows, held-out rows, texts of the base's own kind. Learning rates are those of
`run_method`: earlier chapters' for the bundled model, customary ones elsewhere; none was swept for this table, so it
says what a first try gives.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pefttools.lab.capstone_memory import counted, job_of, predicted
from pefttools.lab.capstone_table import COLUMNS, MiB, line_of, markdown, points, read_table, write_table

__all__ = ["COLUMNS", "HAND_IN", "LARGE", "METHODS", "SMALL", "MiB", "Scale", "Task", "attempt", "gpu_named", "job_for",
           "line_of", "longest", "markdown", "points", "predictor", "read_table", "room_of", "run_all", "run_one",
           "scale_of", "write_table"]

METHODS = ("qlora", "lora", "dora", "adapter", "ia3", "prefix", "prompt", "full")
LARGE_WIDTH = 1024          # hidden size from which a base counts as large
HAND_IN = 60          # steps of the adapter that is handed in: some 15 seconds on two quiet cores


@dataclass(frozen=True)
class Scale:
    """Lengths and settings for one size of base.

    first       optimizer steps of the first run; steps: of each row of the table; examples: rows in one step
    max_length  tokens of a row; rows: how many of the data set; look: held-out rows; texts: documents for forgetting
    lr          peak learning rate of the first run; the table's are `run_method`'s own for each method
    """

    first: int
    steps: int
    examples: int
    max_length: int
    rows: int
    look: int
    texts: int
    r: int
    alpha: int
    length: int
    width: int
    lr: float


SMALL = Scale(first=HAND_IN, steps=40, examples=8, max_length=256, rows=2000, look=64, texts=6, r=16, alpha=32,
              length=16, width=16, lr=1e-2)
# Steps were chosen for some 15 minutes (first) and 3 to 5 minutes (each row) on a T4 by arithmetic, not by measurement:
# 4 · 1.24e9 operations a token, at a seventh of the 65 · 10¹² that a T4 is sold with, is 1,900 tokens a second, and half
# of that is what unpacking 4-bit weights and small batches may leave. `python -m pefttools.bench.capstone` measures.
LARGE = Scale(first=250, steps=60, examples=16, max_length=512, rows=4200, look=128, texts=6, r=8, alpha=16, length=20,
              width=64, lr=2e-4)


def scale_of(base: Any) -> Scale:
    """SMALL or LARGE, by the base's width; in the test suite (PEFTTOOLS_QUICK=1) the same with next to no steps."""
    from dataclasses import replace

    scale = LARGE if base.model.config.hidden_size >= LARGE_WIDTH else SMALL
    if os.environ.get("PEFTTOOLS_QUICK") == "1":
        return replace(scale, steps=2, look=8, texts=1)
    return scale


@dataclass
class Task:
    """What every row of the table shares. `load` gives a fresh base: a method changes the one that it gets."""

    load: Callable[[], Any]
    rows: list[dict]
    held_out: list[dict]
    texts: dict[str, str]
    scale: Scale
    folder: Path
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scale.examples & (self.scale.examples - 1):
            raise ValueError(f"scale.examples={self.scale.examples}: a power of two is needed, for it is halved until "
                             "it fits.")
        self.folder = Path(self.folder)


# ------------------------------------------------------------------------------------------------ before the run

def longest(rows: Sequence[dict], tokenizer: Any, scale: Scale) -> list[dict]:
    """The batch that decides memory: the longest rows, as ids. As many as a step has examples."""
    from pefttools.lab.text import encoded

    by_text = sorted(rows, key=lambda row: -len(row["instruction"] + (row.get("input") or "") + row["output"]))
    # the longest text has nearly, not always, the most tokens
    ids = encoded(by_text[:8 * scale.examples], tokenizer, scale.max_length)
    return sorted(ids, key=lambda row: -len(row["input_ids"]))[:scale.examples]


def job_for(model: Any, method: str, batch: int, checkpointing: bool, seq: int, scale: Scale, place: Any) -> Any:
    """The memory model's job for one row of the table. Full fine-tuning is counted in float32, in which `run_method`
    keeps whatever it trains; its activations, which autocast computes in 16 bits, are then counted too high."""
    kind = {"qlora": "all-linear", "lora": "all-linear", "dora": "all-linear"}
    settings = {"r": scale.r, "targets": kind.get(method), "length": scale.length, "width": scale.width}
    if place.gpu:
        settings |= {"gpu": gpu_named(place.gpu)}
    return job_of(model, method, batch, seq, accumulate=scale.examples // batch, checkpointing=checkpointing,
                  dtype="float32" if method == "full" else str(place.dtype).removeprefix("torch."), **settings)


def gpu_named(name: str) -> str | None:
    """The memory model's name for this GPU; None for one that it does not know."""
    from pefttools.vram.gpus import find_gpu

    try:
        return find_gpu(name).name.lower().replace(" ", "-")
    except ValueError:
        return None


def predictor(model: Any, seq: int, scale: Scale, place: Any) -> Callable[[str, int, bool], int]:
    """predict(method, batch, checkpointing) → bytes of tensors at the peak of a step, by the formula. Remembers."""
    known: dict[tuple, int] = {}

    def predict(method: str, batch: int, checkpointing: bool) -> int:
        key = method, batch, bool(checkpointing)
        if key not in known:
            known[key] = predicted(job_for(model, *key, seq, scale, place))
        return known[key]

    return predict


def room_of(place: Any, pretend: int) -> int:
    """Bytes for tensors: what the GPU has less a CUDA context, or `pretend` where there is no GPU to fill."""
    if not place.gpu:
        return pretend
    from pefttools.vram.gpus import DEFAULT, find_gpu

    return place.memory - find_gpu(gpu_named(place.gpu) or DEFAULT).context


# ------------------------------------------------------------------------------------------------ one row, and all

def run_one(task: Task, method: str, choice: dict[str, Any], before: Any = None) -> dict[str, Any]:
    """Train `method` as planned, save it, measure it: a row of the table, plain data. The model is let go."""
    from pefttools.lab import bootstrap, forgetting, row_losses
    from pefttools.lab.finetune import run_method

    scale, base = task.scale, task.load()
    targets = "all-linear" if "lora" in method or "dora" in method else None
    alpha = {"alpha": scale.alpha} if targets else {}
    result = run_method(method, base=base, data=task.rows, out=task.folder / method, steps=scale.steps,
                        batch=choice["batch"], accumulate=choice["accumulate"],
                        checkpointing=choice["checkpointing"], max_length=scale.max_length, r=scale.r, targets=targets,
                        length=scale.length, width=scale.width, seed=task.seed, quiet=True, anyway=True, **alpha)
    peak = result.peak.allocated
    if result.peak.kind != "gpu":
        worst = longest(task.rows, base.tokenizer, scale)[:choice["batch"]]
        peak = counted(result.model, worst, base.tokenizer.pad_token_id, choice["checkpointing"], choice["accumulate"])
    nats, targets_seen = zip(*row_losses(result.model, result.tokenizer, task.held_out, max_length=scale.max_length))
    lost = forgetting(result.model, result.tokenizer, task.texts, before=before)
    row = {"method": method, "base": result.base, "trainable": result.trainable, "parameters": result.parameters,
           "planned": choice["bytes"], "measured": peak, "counter": result.peak.kind, **choice,
           "tokens_per_second": result.tokens_per_second, "seconds": result.seconds, "steps": scale.steps,
           "loss": asdict(bootstrap(nats, targets_seen)), "forgetting": asdict(lost.change),
           "curve": [round(each, 4) for each in result.history.smooth(10)]}
    del result, base
    gc.collect()
    return row


def run_all(task: Task, plan: dict[str, Any], say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """A row for every method of the plan, QLoRA first; what does not fit is a row that says so.

    Rows are kept in `folder`/table.json as they end, so that a call after a session that was lost goes on; a row with
    other settings is run anew.
    """
    from pefttools.lab import document_losses

    base = task.load()
    before = document_losses(base.model, base.tokenizer, task.texts)
    name = base.name
    del base
    file = task.folder / "table.json"
    kept = read_table(file)
    rows = []
    for method, choice in plan.items():
        asked = {"base": name, "choice": choice, "scale": asdict(task.scale), "seed": task.seed, "rows": len(task.rows)}
        done = kept.get(method, {})
        if done.get("asked") != json.loads(json.dumps(asked)):
            if choice is None:
                row = {"method": method, "base": name, "missing": "does not fit, by the plan"}
            else:
                again = ", checkpointing" if choice["checkpointing"] else ""
                say(f"{method}: batch {choice['batch']} × {choice['accumulate']}{again}, planned "
                    f"{choice['bytes'] / MiB:,.0f} MiB …")
                row = run_or_say(task, method, choice, before)
            done = kept[method] = {"asked": json.loads(json.dumps(asked)), "row": row}
            write_table(file, kept)
        rows.append(done["row"])
        say(line_of(done["row"]))
    return rows


def run_or_say(task: Task, method: str, choice: dict[str, Any], before: Any) -> dict[str, Any]:
    """`run_one`; running out of memory is a result as well."""
    from pefttools.lab.finetune import OutOfMemory

    try:
        return run_one(task, method, choice, before)
    except OutOfMemory as error:
        return {"method": method, "missing": f"out of memory: {str(error).splitlines()[0]}"}


# ------------------------------------------------------------------------------------------------ the student's code

def attempt(function: Callable[..., Any], *arguments: Any, otherwise: Any = None, **more: Any) -> Any:
    """What the student's function returns; `otherwise` (called, if it is a function) while it is a stub.

    Any other error goes on: it is the student's to see.
    """
    try:
        return function(*arguments, **more)
    except NotImplementedError as error:
        print(f"({str(error) or 'not written yet'}: the library's takes its place here)")
        return otherwise(*arguments, **more) if callable(otherwise) else otherwise
