"""From a chapter's one source to the notebooks that students, instructors and nbgrader open.

    solutions/02_lora.py ──source.py, chapter.py──► notebook ──release.py──► course/02_lora/lora.ipynb    no solutions
                                                       ├──► grading/source/02_lora/lora.ipynb    nbgrader's "source"
                                                       └──► solutions/02_lora.ipynb    the instructor's, to open or run

The same bytes each time, so that a plain comparison of files finds a `course/` that was edited by hand or not built
again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pefttools.grading.chapter import dumps, read_chapter
from pefttools.grading.source import BuildError, registry


def find_root(start: str | Path | None = None) -> Path:
    """The course's root: the nearest folder at or above `start` (default: here) with a `solutions/` folder in it."""
    start = Path(start or ".").resolve()
    for folder in (start, *start.parents, Path(__file__).resolve().parents[2]):
        if (folder / "solutions").is_dir():
            return folder
    raise BuildError(f"no solutions/ folder at or above {start}: run this in a checkout of the course")


def sources(root: Path, names: Iterable[str] = ()) -> list[Path]:
    """The chapters' source files, all or those named ("02_lora", "lora", "02" or a path)."""
    every = sorted(p for p in (root / "solutions").glob("[0-9][0-9]_*.py"))
    chosen = []
    for name in names:
        stem = Path(name).stem
        match = [p for p in every if stem in (p.stem, p.stem[3:], p.stem[:2])]
        if not match:
            raise BuildError(
                f"no chapter {name!r} in solutions/; there are: {', '.join(p.stem for p in every) or 'none'}"
            )
        chosen += match
    return chosen or every


def build(
    root: str | Path | None = None,
    names: Iterable[str] = (),
    *,
    check: bool = False,
    execute: bool = False,
    entries: Callable[[str], dict[str, Any]] = registry,
    log: Callable[[str], Any] = print,
) -> list[str]:
    """Build chapters; return the released paths that changed (with `check`: that would change; nothing is written).

    Without `names` every chapter is built, and a released chapter whose source is gone is reported as drift. With
    `execute` the instructor's notebooks are run, so that they hold outputs (minutes; PEFTTOOLS_QUICK=1 shortens).
    `entries` gives a chapter's exercises by name (tests replace it).
    Raises `BuildError` for a faulty chapter; nothing is written for it.
    """
    from pefttools.grading.nbgrader_config import write_config
    from pefttools.grading.release import release

    root = find_root(root)
    names = list(names)
    if not check:
        write_config(root)
    changed = []
    for path in sources(root, names):
        chapter = read_chapter(path, entries(path.stem))
        text = dumps(release(chapter))
        target = root / chapter.released
        old = target.read_text(encoding="utf-8") if target.is_file() else None
        if text != old:
            changed.append(chapter.released)
            log(
                f"{'differs' if check else 'wrote'} {chapter.released}"
                + (f": {_difference(old, text)}" if check else "")
            )
        if check:
            continue
        source = dumps(chapter.notebook)
        write(root / "grading" / "source" / chapter.name / f"{chapter.short}.ipynb", source)
        instructor = root / "solutions" / f"{chapter.name}.ipynb"
        if execute:
            log(f"running {instructor.relative_to(root)} …")
            write(instructor, dumps(run(chapter.notebook, root)))
        else:
            write(instructor, source)
        if text != old:
            write(target, text)
    if not names:
        built = {p.stem for p in sources(root)}
        for stale in sorted((root / "course").glob("[0-9][0-9]_*")):
            if stale.name not in built:
                changed.append(f"course/{stale.name}")
                log(f"course/{stale.name} has no source solutions/{stale.name}.py: remove it")
    return changed


def _difference(old: str | None, new: str) -> str:
    """The first place where two notebooks' texts part, in one line."""
    if old is None:
        return "it has not been built yet; run `make build`"
    for n, (was, now) in enumerate(zip_longest(old.splitlines(), new.splitlines(), fillvalue="(end)"), 1):
        if was != now:
            return (
                f"line {n} is {was.strip()[:70]!r}, the build gives {now.strip()[:70]!r}; "
                "run `make build`, never edit course/"
            )
    return "only line ends differ; run `make build`"


def write(path: Path, text: str) -> None:
    """Write a text file with Unix line ends, also over one that nbgrader left read-only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.stat().st_mode & 0o200:  # nbgrader leaves files read-only
        path.chmod(0o644)
    path.write_text(text, encoding="utf-8", newline="\n")


def run(notebook: Any, folder: str | Path, *, allow_errors: bool = False, timeout: int = 1800) -> Any:
    """Execute a notebook in a fresh kernel with `folder` as its working directory; returns it with outputs."""
    import nbformat
    from nbclient import NotebookClient

    from pefttools.grading.nbgrader_config import KERNEL_ARGUMENTS, paths

    notebook = nbformat.from_dict(notebook)
    NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        allow_errors=allow_errors,
        extra_arguments=KERNEL_ARGUMENTS,
        resources={"metadata": {"path": str(folder)}},
    ).execute(env={**os.environ, **paths()})
    return notebook
