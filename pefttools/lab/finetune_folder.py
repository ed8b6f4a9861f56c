"""The folder of a fine-tune: whose it is, what stands in it before the first step, one process at a time.

    run.yaml        every setting                        written before the first step, so that a killed run has it
    data.jsonl      rows that came from Python           so that the command can repeat what a notebook did
    checkpoint.pt   where it is                          (training_checkpoint.py)
    adapter_*       peft's two files                     at the end
    result.json     numbers of the run, and its curves   at the end
"""
from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pefttools.lab.finetune_config import Settings, WrongQuestion
from pefttools.lab.finetune_yaml import NAME, check_same, config_text


def begin(folder: Path, settings: Settings, rows: list | None, held_out: list | None) -> None:
    """run.yaml, and beside it the rows that came from Python. ValueError where the folder's run is another one."""
    from pefttools.lab.training_checkpoint import write_whole

    if folder.exists() and not folder.is_dir():
        raise WrongQuestion(f"--out {folder} is a file; give the path of a folder.")
    names = {}
    for name, given in (("data", rows), ("held_out", held_out)):
        if given is not None:
            names[name] = str(folder / f"{name}.jsonl")
    text = config_text(replace(settings, **names, columns={} if names else settings.columns))
    if (folder / NAME).exists() and (folder / "checkpoint.pt").exists():
        check_same(folder / NAME, text)
    for name, given in (("data", rows), ("held_out", held_out)):
        if given is not None:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in given).encode()
            write_whole(folder / f"{name}.jsonl", lambda file: file.write(lines), f"{name}.jsonl")
    write_whole(folder / NAME, lambda file: file.write(text.encode()), NAME)


@contextlib.contextmanager
def taken(folder: Path | None) -> Iterator[None]:
    """While this holds, no other process trains into the folder; ValueError if one does. A kill gives it back."""
    if folder is None or folder.exists() and not folder.is_dir():
        yield
        return
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{folder} is being trained into by another process: wait for it, or use another folder"
                         ) from None
    except NotImplementedError:                                # a file system without locks
        pass
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def processes_in_turn(processes: Any) -> Iterator[None]:
    """The first process goes through the block before the others."""
    if not processes.first:
        processes.wait()
    yield
    if processes.first:
        processes.wait()
