"""How good is it? Held-out loss, and pass@1: write the program, run its tests."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from pefttools.lab.generation import generate
from pefttools.lab.text import IGNORE, collate, encoded
from pefttools.lab.training import loss_sum

RUNNER = Path(__file__).with_name("run_tests.py")


@torch.no_grad()
def held_out_loss(model, tokenizer, data, batch_size: int = 32, max_length: int = 256) -> float:
    """Mean loss over the target tokens of `data`, in nats per token. Every token weighs the same, padding nothing."""
    was_training = model.training
    model.eval()
    rows = sorted(encoded(data, tokenizer, max_length), key=lambda r: len(r["input_ids"]))
    device = next(model.parameters()).device
    total = count = 0
    for i in range(0, len(rows), batch_size):
        batch = collate(rows[i:i + batch_size], tokenizer.pad_token_id)
        total += loss_sum(model, {k: v.to(device) for k, v in batch.items()}).item()
        count += int((batch["labels"][:, 1:] != IGNORE).sum())
    model.train(was_training)
    if not count:
        raise ValueError("no row has a target token: there is nothing to take a loss over")
    return total / count


def code_of(answer: str) -> str:
    """The program in an answer: what stands between the first ```python fence and the next ```, or all of it."""
    fenced = re.search(r"```(?:python)?[ \t]*\n(.*?)(?:\n?```|\Z)", answer, re.DOTALL)
    return fenced.group(1) if fenced else answer


def run_programs(programs: list[tuple[str, list[str]]], seconds: int = 3, mb: int = 512) -> list[dict]:
    """Run each (code, tests) in a process with limits. Returns {"passed": bool, "error": str} for each, in order.

    seconds: wall and CPU time a program may take. mb: memory in MiB. The environment is empty and the folder is
    scratch; the network is not cut off here, so run only code you would run anyway.
    """
    if sys.platform == "win32":
        raise OSError("programs are run with POSIX limits: on Windows use WSL")
    if not programs:
        return []
    jobs = [json.dumps({"code": c, "tests": list(t), "seconds": seconds, "mb": mb}) for c, t in programs]
    workers = max(1, min(len(jobs), os.cpu_count() or 1))
    shares = [range(w, len(jobs), workers) for w in range(workers)]

    def share(numbers) -> list[dict]:
        done = subprocess.run([sys.executable, "-I", "-S", str(RUNNER)], input="\n".join(jobs[i] for i in numbers) + "\n",
                              capture_output=True, text=True, env={"PATH": os.defpath}, check=False)
        out = [json.loads(line) for line in done.stdout.splitlines()]
        if len(out) != len(numbers):
            raise RuntimeError(f"the test runner stopped after {len(out)} of {len(numbers)} programs: {done.stderr[-300:]}")
        return out

    results: list[dict] = [{}] * len(jobs)
    with ThreadPoolExecutor(workers) as pool:
        for numbers, out in zip(shares, pool.map(share, shares)):
            for i, result in zip(numbers, out):
                results[i] = result
    return results


def wilson(passed: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927): honest at 0 of n and n of n, where p ± z·s is not."""
    p, d = passed / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    middle = (p + z * z / (2 * n)) / d
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass
class Report:
    """An evaluation. `rows`: one dict per row with instruction, kind, answer, passed, error."""

    rows: list[dict]
    seconds: float

    @property
    def pass_at_1(self) -> float:
        """Share of rows whose one greedy answer passes all its tests, 0 to 1."""
        return sum(r["passed"] for r in self.rows) / len(self.rows)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of `pass_at_1` from the number of rows alone."""
        return wilson(sum(r["passed"] for r in self.rows), len(self.rows))

    @property
    def by_kind(self) -> dict[str, tuple[int, int]]:
        """kind → (passed, rows), worst first."""
        count: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for r in self.rows:
            count[r["kind"]][0] += r["passed"]
            count[r["kind"]][1] += 1
        return {k: tuple(v) for k, v in sorted(count.items(), key=lambda kv: (kv[1][0] / kv[1][1], kv[0]))}

    def __repr__(self) -> str:
        low, high = self.interval
        return (f"Report(pass@1 {100 * self.pass_at_1:.1f} % of {len(self.rows)} rows over {len(self.by_kind)} kinds, "
                f"95 % interval {100 * low:.1f} to {100 * high:.1f} %)")


def evaluate(model, tokenizer, data, *, n: int | None = None, seed: int = 0, max_new_tokens: int = 160,
             seconds: int = 3) -> Report:
    """pass@1 of `model` on rows with tests: one greedy answer per row, run in a subprocess against the row's tests.

    n: evaluate that many rows drawn with `seed` (all by default).
    """
    from pefttools.lab.data import prompt_of

    began = time.perf_counter()
    rows = list(data)
    if not rows or (n is not None and n < 1):
        raise ValueError("there are no rows to evaluate" if not rows else f"n must be at least 1, got {n}")
    if n is not None and n < len(rows):
        pick = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:n].tolist()
        rows = [rows[i] for i in sorted(pick)]
    answers = generate(model, tokenizer, [prompt_of(r) for r in rows], max_new_tokens)
    results = run_programs([(code_of(a), r["tests"]) for a, r in zip(answers, rows)], seconds)
    return Report([{"instruction": r["instruction"], "input": r["input"], "kind": r["kind"], "answer": a, **result}
                   for r, a, result in zip(rows, answers, results)], time.perf_counter() - began)
