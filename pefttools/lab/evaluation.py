"""How good is it? pass@k: write programs, run their tests. (Losses are in `losses.py`, intervals in `intervals.py`.)"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pefttools.lab.intervals import Interval, bootstrap, wilson
from pefttools.lab.generation import generate
from pefttools.lab.losses import held_out_loss
from pefttools.lab.passk import pass_at_k
from pefttools.lab.programs import code_of, run_programs

__all__ = ["Report", "code_of", "evaluate", "held_out_loss", "run_programs", "wilson"]
WHERE = {"sandbox": "in a sandbox (bubblewrap)", "subprocess": "in a subprocess with limits, without a sandbox"}


@dataclass
class Report:
    """An evaluation. `rows`: one dict per row with instruction, input, kind, answer, passed, error and samples.

    answer, passed and error are those of the first sample; `samples` lists all of them as dicts. `where` says in what
    the programs ran: "sandbox" or "subprocess".
    """

    rows: list[dict]
    seconds: float
    where: str = "subprocess"
    k: tuple[int, ...] = (1,)

    @property
    def samples(self) -> int:
        """Answers drawn for each row."""
        return len(self.rows[0].get("samples", [None]))

    def values(self, k: int = 1) -> list[float]:
        """Each row's pass@k, 0 to 1, in order: what `bootstrap` and `paired_bootstrap` take."""
        return [pass_at_k(len(s), sum(each["passed"] for each in s), k)
                for s in (r.get("samples", [r]) for r in self.rows)]

    def pass_at(self, k: int = 1) -> Interval:
        """pass@k with a 95 % interval: Wilson's for one answer a row, else the bootstrap over rows.

        Wilson's too where all rows agree (none passed, say): the bootstrap would be sure of that. Either is about other
        rows of this kind, not about another training run.
        """
        values = self.values(k)
        if self.samples == 1 or len(set(values)) == 1 and values[0] in (0.0, 1.0):
            return Interval(sum(values) / len(values), *wilson(round(sum(values)), len(values)))
        return bootstrap(values)

    @property
    def pass_at_1(self) -> float:
        """Share of answers that pass all their row's tests, 0 to 1."""
        values = self.values()
        return sum(values) / len(values)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of `pass_at_1` from the rows alone."""
        return self.pass_at(1).low, self.pass_at(1).high

    @property
    def by_kind(self) -> dict[str, tuple[int, int]]:
        """kind → (passed, rows), worst first; of the first samples."""
        count: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for r in self.rows:
            count[r["kind"]][0] += r["passed"]
            count[r["kind"]][1] += 1
        return {k: tuple(v) for k, v in sorted(count.items(), key=lambda kv: (kv[1][0] / kv[1][1], kv[0]))}

    def __repr__(self) -> str:
        found = {k: [100 * end for end in self.pass_at(k)] for k in self.k}
        said = ", ".join(f"pass@{k} {value:.1f} %, 95 % interval {low:.1f} to {high:.1f} %"
                         for k, (value, low, high) in found.items())
        several = f", {self.samples} samples a row" if self.samples > 1 else ""
        return f"Report({said}; {len(self.rows)} rows over {len(self.by_kind)} kinds{several}; run {WHERE[self.where]})"


def evaluate(model, tokenizer, data, *, n: int | None = None, seed: int = 0, max_new_tokens: int = 160,
             seconds: int = 3, samples: int = 1, temperature: float = 0.0, k: Sequence[int] = (1,),
             progress: bool = False) -> Report:
    """pass@k of `model` on rows with tests: answers are run against the row's tests, in a sandbox where there is one.

    n: evaluate that many rows drawn with `seed` (all by default). samples: answers a row; sample j is generated with
    the seed `seed + j`. temperature: 0 is greedy, and then one sample is all there is. k: what `Report` prints, each at
    most `samples`. seconds: what a program may take. Raises ValueError for no rows and for settings that do not fit.
    """
    from pefttools.lab.data import prompt_of

    began = time.perf_counter()
    rows = list(data)
    if not rows or (n is not None and n < 1):
        raise ValueError("there are no rows to evaluate" if not rows else f"n must be at least 1, got {n}")
    k = tuple(k)
    check_sampling(samples, temperature, k)
    if n is not None and n < len(rows):
        pick = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:n].tolist()
        rows = [rows[i] for i in sorted(pick)]
    if missing := [r for r in rows if not r.get("tests")]:
        raise ValueError(f"{len(missing)} of {len(rows)} rows have no tests: pass@k needs a list `tests` in each row")
    prompts = [prompt_of(r) for r in rows]
    answers = [generate(model, tokenizer, prompts, max_new_tokens)] if temperature == 0 else [
        generate(model, tokenizer, prompts, max_new_tokens, temperature=temperature, seed=seed + j)
        for j in range(samples)]
    jobs = [(code_of(a), tuple(r["tests"])) for drawn in answers for a, r in zip(drawn, rows)]
    once = list(dict.fromkeys(jobs))  # a sure model writes the same program many times
    ran = run_programs(once, seconds, progress=progress)
    result = dict(zip(once, ran))
    done = [{**result[job], "answer": a} for job, a in zip(jobs, (a for drawn in answers for a in drawn))]
    found = [{"instruction": r["instruction"], "input": r["input"], "kind": r["kind"], **done[i],
              "samples": done[i::len(rows)]} for i, r in enumerate(rows)]
    return Report(found, time.perf_counter() - began, ran.where, k)


def check_sampling(samples: int, temperature: float, k: Sequence[int]) -> None:
    """Raises ValueError where these do not go together."""
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if samples > 1 and temperature == 0:
        raise ValueError(f"samples={samples} with temperature=0 would be the same answer {samples} times: set a "
                         "temperature above 0, such as 0.8")
    if wrong := [each for each in k if not 1 <= each <= samples]:
        raise ValueError(f"k={wrong[0]} needs at least that many samples of each row; samples={samples}")
