"""Checkpoints of `lab.train`: whole or not there, and never taken up by a run that they do not belong to.

    checkpoint.part ──written, flushed to the disk──► renamed ──► checkpoint.pt      a kill at any moment leaves the old
                                                                                    one or the new one, whole

In it: the trained parameters, the optimizer's state, the loss of every step, the state of the random numbers, the best
parameters on held-out data where there are some, and what the run was asked to do.
"""
from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

NAME = "checkpoint.pt"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NotWritten(OSError):
    """A file that could not be written: `errno` as the system has it, and a sentence."""

    def __str__(self) -> str:
        return str(self.strerror)


def write_whole(path: Path, write: Callable[[BinaryIO], Any], what: str) -> None:
    """Let `write` fill a file beside `path`, flush it to the disk, and rename it to `path`.

    Raises NotWritten with what is lost and what is kept if it cannot be written; what was at `path` is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    size = 0
    try:
        with open(part, "wb") as file:
            try:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            finally:
                size = os.fstat(file.fileno()).st_size
        os.replace(part, path)
    except Exception as error:
        part.unlink(missing_ok=True)
        cause = cause_of(error)
        if cause is None:
            raise
        why = f"{os.strerror(cause.errno)}; {room(path.parent)}, and {size / 2**20:.1f} MiB were written before it " \
              "failed" if cause.errno in FULL else str(cause)
        kept = f"The one from before, {path}, is whole" if path.exists() else "Nothing half-written is left behind"
        raise NotWritten(cause.errno, f"{what} could not be written to {path.parent} ({why}). {kept}. Make room (or "
                         "name another folder), and run the same again: it goes on from what is whole") from error


def cause_of(error: BaseException | None) -> OSError | None:
    """The OSError behind an error of a library that writes files, or None."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        seen.append(error)
        error = error.__cause__ or error.__context__
    for each in seen:  # torch's own writer and safetensors say it in words
        for number in FULL:
            if os.strerror(number).lower() in str(each).lower() or f"os error {number}" in str(each).lower():
                return OSError(number, os.strerror(number))
    return None


def room(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free there"
    except OSError:
        return "how much is free there cannot be read"


def keep(path: Path, run: dict, params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, history: Any,
         step: int, more: dict[str, Any] | None = None) -> None:
    """Write a checkpoint beside the old one, then swap: a kill at any moment leaves a whole checkpoint."""
    content = {"run": run, "step": step, "params": {n: p.detach().cpu() for n, p in params.items()},
               "optimizer": optimizer.state_dict(), "history": vars(history), "rng": torch.get_rng_state(),
               **(more or {})}
    write_whole(path, lambda file: torch.save(content, file), f"the checkpoint of step {step}")


def read(path: Path) -> dict[str, Any]:
    """What is in a checkpoint, on the CPU. ValueError for a damaged file, or one of something else."""
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as e:  # a damaged file raises half a dozen kinds of error
        raise ValueError(f"{path} is not a whole checkpoint ({type(e).__name__}): delete it to start this run again"
                         ) from e
    if not isinstance(saved, dict) or not {"run", "step", "params", "optimizer", "history", "rng"} <= saved.keys():
        raise ValueError(f"{path} is a file of something else, not a checkpoint of lab.train: move it away, or use "
                         "another folder")
    return saved


def same_run(path: Path, before: dict[str, Any], run: dict[str, Any]) -> None:
    """ValueError unless the checkpoint's run is this one: says what has changed. A fact not noted is no change."""
    changed = [k for k in run if before.get(k, run[k]) != run[k]]
    if changed:
        silent = {"trainable": "what is trained", "data": "the rows"}
        said = ", ".join(f"{silent[k]} has changed" if k in silent else f"{k} was {before.get(k)} and is {run[k]}"
                         for k in changed).replace("rows has", "rows have")
        raise ValueError(f"{path} belongs to another run ({said}): use another folder, or delete it to start again")


def restore(saved: dict[str, Any], params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, history: Any
            ) -> int:
    """Put a checkpoint into the parameters and the optimizer. Returns the step to go on with."""
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(saved["params"][name])
    optimizer.load_state_dict(saved["optimizer"])
    vars(history).update(saved["history"])
    torch.set_rng_state(saved["rng"])
    return saved["step"]


def values_of(params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """A copy of the parameters' values on the CPU."""
    return {name: p.detach().to("cpu", copy=True) for name, p in params.items()}
