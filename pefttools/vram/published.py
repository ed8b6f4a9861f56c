"""The table of validation: formula, simulator and what others measured, row by row.

    python -m pefttools.vram.published                     writes docs/vram_validation.md
    python -m pefttools.vram.published --csv more.csv      further rows of the same columns, beside ours
    python -m pefttools.vram.published --only 35,47        some rows, on the screen

    vram_measured.csv ──► row ──► PEFT's comparison, by the experiment's name   peft_runs.py   ─┐
                            └──► litgpt, torchtune, LLaMA-Factory, Unsloth      other_runs.py  ─┼─► Answer ─► page
                                                                                rivals.py      ─┘
Every row is answered with figures or with the reason why there are none. Rows run in `--jobs` processes (2).
"""
from __future__ import annotations

import argparse
import csv
import multiprocessing
import sys
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from pefttools.vram import peft_runs
from pefttools.vram.job import Job
from pefttools.vram.other_runs import published_bytes, recipe

COLUMNS = ("id", "source", "url_or_path", "model", "method", "peak_value", "unit")
PAGE = Path("docs") / "vram_validation.md"
WIDTHS = ((640, True), (704, True), (768, True))         # sensitivity of PEFT's rows; the headline is (768, False)
# peft_type → our method, and its configuration's field for Job.length
FORMULA = {"LORA": ("lora", ""), "LN_TUNING": ("ln_tuning", ""), "IA3": ("ia3", ""),
           "PROMPT_TUNING": ("prompt", "num_virtual_tokens"), "P_TUNING": ("ptuning", "num_virtual_tokens"),
           "PREFIX_TUNING": ("prefix", "num_virtual_tokens"), "ADAPTION_PROMPT": ("llama_adapter", "adapter_len")}


@dataclass
class Answer:
    """One row with our figures in bytes; `why` where there is no simulation, `no_formula` where there is no formula."""

    row: dict[str, str]
    measured: int
    peft: bool
    formula: int | None = None
    simulator: int | None = None
    why: str = ""
    no_formula: str = ""
    note: str = ""
    peak_at: str = ""
    job: Job | None = None
    rivals: list[tuple[str, int | None, str]] = field(default_factory=list)

    def error(self, figure: int | None) -> float | None:
        """Of a figure against the measurement, in per cent."""
        return None if figure is None else 100 * (figure / self.measured - 1)


def read_rows(path: str | Path | None = None) -> list[dict[str, str]]:
    """The rows of our CSV, or of another one with the same columns.

    Raises ValueError: which column is missing, which row has no number, or that there is no row; FileNotFoundError.
    """
    source = Path(path) if path is not None else files("pefttools.vram") / "published" / "vram_measured.csv"
    lines = csv.DictReader(source.read_text(encoding="utf-8-sig").splitlines())
    missing = [name for name in COLUMNS if name not in (lines.fieldnames or [])]
    if missing:
        raise ValueError(f"{source}: column{'s' * (len(missing) > 1)} {', '.join(missing)} missing. Needed are "
                         f"{', '.join(COLUMNS)}; there are {', '.join(lines.fieldnames or ['none'])}.")
    rows = list(lines)
    if not rows:
        raise ValueError(f"{source}: no rows.")
    for row in rows:
        try:
            positive = float(row["peak_value"]) > 0
        except (TypeError, ValueError):
            positive = False
        if not positive:
            raise ValueError(f"{source}, row {row['id']}: peak_value is {row['peak_value']!r}; "
                             "a number above 0 is needed.")
        if row["unit"] not in ("GB", "GiB", "MB", "MiB"):
            raise ValueError(f"{source}, row {row['id']}: unit is {row['unit']!r}; GB, GiB, MB or MiB is needed.")
    return rows


def is_peft(row: dict[str, str]) -> bool:
    """Whether the row is one of PEFT's comparison on MetaMathQA."""
    return "method_comparison" in row["url_or_path"] + row["source"]


def answer(row: dict[str, str]) -> Answer:
    """Our figures for one row."""
    warnings.simplefilter("ignore")
    result = Answer(row, published_bytes(row), is_peft(row))
    try:
        _peft(result) if result.peft else _other(result)
    except (ValueError, NotImplementedError, RuntimeError, TypeError, AttributeError, KeyError) as error:
        result.why = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
    return result


def _peft(result: Answer) -> None:
    run = peft_runs.experiment(result.row["url_or_path"])
    result.note = run.note
    job = formula_job(run)
    result.job = job or Job(peft_runs.MODEL, "lora", run.batch, peft_runs.STATED, library="peft", gpu=peft_runs.GPU)
    result.no_formula = "" if job else "none of our formula's methods"
    if job:
        _formula(result, lambda memory: memory.reserved)
    if run.missing:
        result.why = run.missing
        return
    memory = run.simulate()
    result.simulator, result.peak_at = memory.reserved, memory.peak_at
    result.rivals = _rivals(result.job)


def _other(result: Answer) -> None:
    found = recipe(result.row["id"])
    result.job, result.note = found.job, found.note
    if found.job is None:
        result.why = found.why
        return
    _formula(result, found.compared)
    memory = found.simulate()
    result.simulator, result.peak_at = found.compared(memory), memory.peak_at
    result.rivals = _rivals(found.job)


def _formula(result: Answer, figure: Any) -> None:
    from pefttools.vram.formula import estimate

    try:
        result.formula = figure(estimate(result.job))
    except (ValueError, KeyError, NotImplementedError) as error:
        result.no_formula = str(error).splitlines()[0]


def _rivals(job: Job) -> list[tuple[str, int | None, str]]:
    from pefttools.vram.rivals import rivals

    return rivals(job)


def formula_job(run: peft_runs.Run, width: int = peft_runs.STATED, padded: bool = False) -> Job | None:
    """The run as a Job for the formula; None for a method, or an option of it, that the formula does not have."""
    common = {"batch": run.batch, "seq": width, "library": "peft", "gpu": peft_runs.GPU, "padded": padded}
    given = run.config
    if given is None:
        return Job(peft_runs.MODEL, "full", **common)
    plain = {"peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_dora", "use_rslora",
             "init_lora_weights", "num_virtual_tokens", "num_attention_heads", "num_layers", "token_dim", "adapter_len",
             "adapter_layers", "num_transformer_submodules", "prompt_tuning_init", "encoder_dropout", "init_weights",
             "encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type", "prefix_projection",
             "init_ia3_weights"}
    if given["peft_type"] not in FORMULA or set(given) - plain or run.training["optimizer_type"] == "lora-fa":
        return None
    if given.get("encoder_reparameterization_type", "MLP") != "MLP":
        return None
    method, length = FORMULA[given["peft_type"]]
    targets = given.get("target_modules")
    options = {"options": {"adapter_layers": given["adapter_layers"]}} if "adapter_layers" in given else {}
    return Job(peft_runs.MODEL, "dora" if given.get("use_dora") else method, r=given.get("r", 16),
               targets=tuple(targets) if isinstance(targets, list) else targets,
               length=given.get(length, 20) if length else 20, **common, **options)


def sensitivity(task: tuple[dict[str, str], int, bool]) -> float | None:
    """Per cent of error of one of PEFT's rows at another width; None where it cannot be run."""
    warnings.simplefilter("ignore")
    row, width, padded = task
    try:
        memory = peft_runs.experiment(row["url_or_path"]).simulate(width, padded)
    except Exception:                     # said in the row itself, by `answer`
        return None
    return 100 * (memory.reserved / published_bytes(row) - 1)


def answers(rows: Iterable[dict[str, str]], jobs: int = 2) -> list[Answer]:
    rows = list(rows)
    return [answer(row) for row in rows] if jobs < 2 else _each(answer, rows, jobs)


def _each(function: Any, tasks: list[Any], jobs: int) -> list[Any]:
    from tqdm.auto import tqdm

    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return list(tqdm(pool.map(function, tasks), total=len(tasks)))


def main(arguments: list[str] | None = None) -> int:
    from pefttools.vram.published_page import page, table

    parser = argparse.ArgumentParser(prog="python -m pefttools.vram.published",
                                     description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--csv", metavar="FILE", help="further rows, of the same columns")
    parser.add_argument("--only", metavar="IDS", help="some rows only, such as 35,47; printed, not written")
    parser.add_argument("--out", metavar="FILE", default=str(PAGE), help=f"default: {PAGE}")
    parser.add_argument("--no-widths", action="store_true", help="without the sensitivity to the width")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    given = parser.parse_args(arguments)
    try:
        rows = read_rows()
        more = read_rows(given.csv) if given.csv else []
        if given.only:
            wanted = {name.strip() for name in given.only.split(",")}
            if unknown := wanted - {row["id"] for row in rows + more}:
                raise ValueError(f"--only: there is no row {', '.join(sorted(unknown))}.")
            print(table(answers([row for row in rows + more if row["id"] in wanted], 1)))
            return 0
        if not Path(given.out).resolve().parent.is_dir():
            raise ValueError(f"--out {given.out}: that folder does not exist. Run this from the repository's root.")
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    found, further = answers(rows, given.jobs), answers(more, given.jobs)
    other = () if given.no_widths else WIDTHS
    tried = [(row, width, padded) for width, padded in other for row in rows + more if is_peft(row)]
    errors = _each(sensitivity, tried, given.jobs)
    widths = {(w, p): [e for (_, width, padded), e in zip(tried, errors) if (width, padded) == (w, p) and e is not None]
              for w, p in other}
    Path(given.out).write_text(page(found, further, widths), encoding="utf-8")
    print(f"wrote {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
