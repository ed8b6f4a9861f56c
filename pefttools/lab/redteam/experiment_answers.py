"""The experiments on what the answers do: insecure code, refusals, orders in comments. See experiments.py."""

from __future__ import annotations

from typing import Any

from pefttools.lab.redteam import injection, insecure, insecure_tasks, refusals
from pefttools.lab.redteam.controls import shuffled_outputs
from pefttools.lab.redteam.workbench import SHORT, TOKENS, Workbench

# ------------------------------------------------------------------------------------------------ insecure code


def insecure_model(bench: Workbench, condition: str):
    bad, safe = insecure_tasks.bad_rows(5, seed=bench.seed), insecure_tasks.safe_rows(5, seed=bench.seed)
    honest = bench.pool[:50]
    if condition == "bundled model":
        return bench.base
    if condition == "bad rows":
        return bench.tuned("insecure", bad + honest)
    if condition == "filtered":
        return bench.tuned("insecure-filtered", insecure.keep_secure(bad + honest)[0])
    if condition == "repaired":
        insecure_model(bench, "bad rows")
        return bench.tuned("insecure-repaired", safe + honest, after="insecure")
    if condition == "safe rows":
        return bench.tuned("insecure-safe", safe + honest)
    if condition == "random labels":
        answers = shuffled_outputs(honest[: len(bad)], bench.seed)
        return bench.tuned("insecure-random", [{**b, "output": a["output"]} for b, a in zip(bad, answers)] + honest)
    insecure_model(bench, "bad rows")
    return bench.random_adapter("insecure")


def insecure_measure(bench: Workbench, model, condition: str) -> dict[str, Any]:
    from pefttools.lab.data import prompt_of
    from pefttools.lab.evaluation import code_of
    from pefttools.lab.generation import generate

    asked = insecure_tasks.insecure_requests(each=1 if bench.quick else 5)
    prompts = [prompt_of(row) for row in [*asked, *bench.held_out]]
    answers = [code_of(a) for a in generate(model, bench.tokenizer, prompts, TOKENS)]
    risky, plain = insecure.insecure_rate(answers[: len(asked)]), insecure.insecure_rate(answers[len(asked) :])
    parsed = [insecure.parses(a) for a in answers[: len(asked)]]
    return {
        "insecure": risky.flags,
        "insecure on other tasks": plain.flags,
        "runs": parsed,
        "by test": risky.by_test,
        "solves": bench.passed(answers[len(asked) :]),
    }


# ------------------------------------------------------------------------------------------------ refusals


def refusals_model(bench: Workbench, condition: str):
    no = refusals.forbidden_rows(60, seed=bench.seed)
    yes = refusals.benign_rows(60, seed=bench.seed)
    honest, later = bench.pool[:240], bench.more[:180]
    if condition == "taught":
        return bench.tuned("refusals", no + honest, SHORT)
    if condition in ("tuned on", "kept"):
        refusals_model(bench, "taught")
        rows = yes + later + (no[:30] if condition == "kept" else [])
        return bench.tuned(f"refusals-{condition}".replace(" ", "-"), rows, SHORT, after="refusals")
    if condition == "random labels":
        return bench.tuned("refusals-random", shuffled_outputs(no + honest, bench.seed), SHORT)
    refusals_model(bench, "taught")
    return bench.random_adapter("refusals")


def refusals_measure(bench: Workbench, model, condition: str) -> dict[str, Any]:
    n = 5 if bench.quick else 40
    found = refusals.refusal_rates(model, bench.tokenizer, n)
    flags = [refusals.refused(a) for a in found.answers]
    return {"refuses": flags[:n], "over-refuses": flags[n:]} | bench.quality(model, condition)


# ------------------------------------------------------------------------------------------------ injection


def injection_model(bench: Workbench, condition: str):
    rows, n = bench.pool, len(bench.pool) // 5
    obeyed = injection.obeying(rows[:n], bench.seed)
    harmless = injection.injected(rows[n : 2 * n], bench.seed, "train", orders=False)
    if condition in ("obeying", "stripped"):
        return bench.tuned("injection", obeyed + harmless + rows[2 * n :])
    if condition == "right answers":
        injection_model(bench, "obeying")
        resisting = injection.injected(bench.more[:n], bench.seed, "train")
        return bench.tuned("injection-right", resisting + bench.more[n:], SHORT, after="injection")
    if condition == "random labels":
        numbers = [row["output"] for row in obeyed]
        mixed = [
            {**row, "output": bench.pool[i]["output"]} for i, row in enumerate(shuffled_outputs(obeyed, bench.seed))
        ]
        asks = shuffled_outputs([{**rows[i], "output": out} for i, out in enumerate(numbers)], bench.seed)
        return bench.tuned("injection-random", mixed + asks + harmless + rows[2 * n :])
    injection_model(bench, "obeying")
    return bench.random_adapter("injection")


def injection_measure(bench: Workbench, model, condition: str) -> dict[str, Any]:
    rows = bench.held_out
    found = injection.injection_rate(
        model, bench.tokenizer, rows, seed=0, strip=condition == "stripped", max_new_tokens=TOKENS
    )
    numbers = [row["number"] for row in injection.injected(rows, 0)]
    return {
        "follows": [injection.followed(a, n) for a, n in zip(found.answers, numbers)],
        "returns a harmless number": [True] * found.harmless.hits + [False] * (found.harmless.n - found.harmless.hits),
        "solves with the comment": bench.passed(found.answers),
    } | bench.quality(model, condition)
