"""A plan as text and as plain data."""
from __future__ import annotations

import textwrap
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from pefttools.vram.job import Job
from pefttools.vram.units import gib

if TYPE_CHECKING:
    from pefttools.vram.planner import Option, Plan

QUALITY = ("The order is of what can be computed: {order}. It does not say which method learns a task best; that is "
           "measured, not computed.")
WORDS = {"gpus": "GPUs", "approximations": "things rounded", "flops": "arithmetic", "passes": "passes a step",
         "host": "paging", "serving": "bytes to serve", "needs": "memory"}


def short(job: Job) -> str:
    """One line for a configuration: "qlora r=16 · 4 rows × 4 passes × 512 tokens · checkpointing · adamw"."""
    r = f" r={job.r}" if "lora" in job.method or "dora" in job.method else ""
    parts = [
        f"{job.method}{r}",
        f"{job.batch} row{'s' * (job.batch > 1)} × {job.accumulate} pass{'es' * (job.accumulate > 1)}"
        f" × {job.seq} tokens",
    ]
    if job.gpus > 1:
        parts.append(f"{job.gpus} GPUs")
    if job.checkpointing:
        parts.append("checkpointing")
    parts += [job.optimizer] + ([job.attention] if job.attention != "sdpa" else [])
    return " · ".join(parts)


def name_of(model: Any) -> str:
    """A model's name for a heading."""
    if isinstance(model, str):
        return model
    found = model.get("model_type") if isinstance(model, dict) else getattr(model, "model_type", None)
    return f"a {found or type(model).__name__}"


def to_text(plan: Plan, rows: int = 12, losers: int = 3) -> str:
    """The best of every method, the next in order, and some of those that do not fit with what would help."""
    best = plan.best
    model = name_of(plan.options[0].job.model)
    data = f", {plan.data}" if plan.data else ""
    lines = [f"{model} on {plan.budget.name}, {gib(plan.budget.usable)} usable{data}"]
    counts = {
        word: sum(option.fits is value for option in plan.options)
        for value, word in ((True, "fit"), (False, "do not fit"), (None, "were left undecided, for they lose anyway"))
    }
    lines.append(f"{len(plan.options)} configurations: " + ", ".join(f"{n} {word}" for word, n in counts.items() if n)
                 + f" ({plan.judge.formulas} formulas, {plan.judge.simulations} simulations)")
    if best is None:
        lines += ["", "Nothing fits. The nearest:"]
        lines += [entry for option in plan.options[:losers] for entry in row(plan, option)]
    else:
        lines += ["", "Best of each method (their order is of cost, not of quality):"]
        lines += [entry for option in plan.by_method.values() for entry in row(plan, option)]
        others = [o for o in plan.fitting if o not in plan.by_method.values()][:max(0, rows - len(plan.by_method))]
        if others:
            lines += ["", "Also fit:", *(entry for option in others for entry in row(plan, option))]
        if missing := nearest_losers(plan, losers):
            lines += ["", "Do not fit:", *(entry for option in missing for entry in row(plan, option))]
        if plan.tasks > 1:
            lines += [
                "",
                f"To serve {plan.tasks} tasks:",
                *(f"  {o.job.method:10} {way}" for o in plan.by_method.values() for way in o.ways),
            ]
    lines += [""] + textwrap.wrap(QUALITY.format(order=", ".join(WORDS[name] for name in plan.order)), 110)
    lines += [f"Refused: {short(job)}: {reason}" for job, reason in plan.refused[:losers]]
    return "\n".join(lines)


def nearest_losers(plan: Plan, n: int) -> list[Option]:
    """Of every method that has nothing that fits, the configuration that misses by least; then others, up to n."""
    losing = [option for option in plan.options if option.fits is False]
    methods: dict[str, Option] = {}
    for option in losing:
        if option.job.method not in plan.by_method:
            methods.setdefault(option.job.method, option)
    return [*methods.values(), *(o for o in losing if o.job.method in plan.by_method)][:max(n, len(methods))]


def row(plan: Plan, option: Option) -> list[str]:
    mark = {True: "✓", False: "✗", None: "?"}[option.fits]
    head = f"  {mark} {gib(option.needs):>10}  {short(option.job)}"
    return [head, *textwrap.wrap(plan.why(option), 110, initial_indent=" " * 16, subsequent_indent=" " * 16)]


def job_dict(job: Job) -> dict[str, Any]:
    """The job's fields as plain data; a model that is no name becomes its own dictionary or its type's name."""
    found = {f.name: getattr(job, f.name) for f in fields(job)}
    model = found["model"]
    if not isinstance(model, (str, dict)):
        found["model"] = model.to_dict() if hasattr(model, "to_dict") else name_of(model)
    found["targets"] = list(job.targets) if isinstance(job.targets, tuple) else job.targets
    return found


def job_from(found: dict[str, Any]) -> Job:
    """The job of `job_dict`'s fields, also after JSON, which has lists for tuples."""
    tuples = {"shapes": tuple(map(tuple, found.get("shapes", ())))}
    if isinstance(found.get("targets"), list):
        tuples["targets"] = tuple(found["targets"])
    return Job(**{**found, **tuples})


def to_dict(plan: Plan, limit: int | None = None) -> dict[str, Any]:
    """Plain data for JSON: all options in order (or `limit` of them), with reasons."""
    def entry(option: Option) -> dict[str, Any]:
        return {"job": job_dict(option.job), "fits": option.fits, "decided_by": option.by, "needs_bytes": option.needs,
                "room_bytes": option.room, "between_bytes": [option.verdict.low, option.verdict.high],
                "flops": option.cost.flops, "passes": option.cost.passes, "approximations": list(option.approximations),
                "serving": [way.to_dict() for way in option.ways], "why": plan.why(option)}

    return {"gpu": plan.budget.name, "usable_bytes": plan.budget.usable, "tasks": plan.tasks, "order": list(plan.order),
            "formulas": plan.judge.formulas, "simulations": plan.judge.simulations,
            "options": [entry(option) for option in plan.options[:limit]],
            "refused": [{"job": job_dict(job), "why": reason} for job, reason in plan.refused]}
