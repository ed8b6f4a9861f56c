"""Why a configuration does not fit, and the smallest change that helps: sentences, each checked before it is said.

    needs 17.3 GiB, T4 has 14.6 GiB usable: the logits of 4 × 2048 tokens, with their loss and its gradient, alone are
    4.2 GiB. Halve the batch (2 rows, 8 passes a step): that needs 12.9 GiB.

A change is proposed only if the configuration with it has been found to fit; among those that do, the first in an order
from "changes nothing but time" to "changes what is trained".
"""
from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import TYPE_CHECKING, Any

from pefttools.vram.job import Job
from pefttools.vram.memory import Memory
from pefttools.vram.serving import resident
from pefttools.vram.units import gb, gib
from pefttools.vram.verdict import Budget, Judge, Verdict, key_of

if TYPE_CHECKING:
    from pefttools.vram.planner import Option, Plan

FROZEN = {"weights", "constants"}
SAY = {
    "weights": "the weights of the model", "constants": "the scales of the 4-bit weights",
    "adapter": "what {method} adds", "gradients": "the gradients of {trainable:,} trained parameters",
    "optimizer": "{optimizer}'s state of {trainable:,} trained parameters",
    "activations": "what the layers keep of {batch} × {seq} tokens for the backward pass",
    "logits": "the logits of {batch} × {seq} tokens, with their loss and its gradient,",
    "temporary": "what only lives at the peak ({peak})",
}


# ------------------------------------------------------------------------------------------------ what is too much

def largest_term(memory: Memory) -> tuple[str, int]:
    """The term that holds most bytes at the peak; weights and their constants count as one."""
    terms = dict(memory.terms)
    terms["weights"] = terms.get("weights", 0) + terms.pop("constants", 0)
    return max(terms.items(), key=lambda item: item[1])


def culprit(memory: Memory, usable: int) -> tuple[str, int]:
    """The term to blame: the weights where they alone are over the budget, else the largest of what can be changed."""
    weights = memory.terms.get("weights", 0) + memory.terms.get("constants", 0)
    if weights + memory.context > usable:
        return "weights", weights
    rest = {name: n for name, n in memory.terms.items() if name not in FROZEN}
    name = max(rest, key=rest.__getitem__) if rest else "weights"
    return (name, rest[name]) if rest and 4 * rest[name] > weights else ("weights", weights)


def in_words(name: str, job: Job, memory: Memory) -> str:
    return SAY[name].format(method=job.method, trainable=memory.trainable, optimizer=job.optimizer, batch=job.batch,
                            seq=job.seq, peak=memory.peak_at)


def too_much(verdict: Verdict, budget: Budget) -> str:
    """"needs 17.3 GiB, T4 has 14.6 GiB usable: the logits of 4 × 2048 tokens, … alone are 4.2 GiB"."""
    name, size = culprit(verdict.memory, verdict.usable)
    words = in_words(name, verdict.job, verdict.memory)
    return (f"needs {gib(verdict.needs)}, {budget.name} has {gib(budget.usable)} usable: {words} alone "
            f"{_is(name)} {gib(size)}")


# ------------------------------------------------------------------------------------------------ what would help

def changes(job: Job) -> Iterator[dict[str, Any]]:
    """Single changes that save memory, as fields: from what only costs time to what trains something else."""
    if job.attention == "eager":
        yield {"attention": "sdpa"}
    rows = job.batch * job.accumulate
    for batch in range(job.batch - 1, 0, -1):
        if rows % batch == 0:
            yield {"batch": batch, "accumulate": rows // batch}
    if not job.checkpointing:
        yield {"checkpointing": True}
    if job.library == "peft":
        yield {"library": "pefttools"}
    if job.optimizer in ("adamw", "adamw_8bit"):
        yield {"optimizer": f"paged_{job.optimizer}"}
    if job.optimizer in ("adamw", "paged_adamw"):
        yield {"optimizer": f"{job.optimizer}_8bit"}
    if job.quantization is None and job.method in ("lora", "dora"):
        yield {"method": f"q{job.method}"}
    elif job.quantization is None and job.method != "full":
        yield {"quantization": "nf4-dq"}
    if job.method == "full":
        yield from ({"method": "lora", "master": False}, {"method": "qlora", "master": False})
    seq = job.seq
    while seq > 128:
        seq //= 2
        yield {"seq": seq}
    for gpus in (2, 4, 8):
        if gpus > job.gpus:
            yield {"gpus": gpus}


def in_steps(job: Job, other: Job) -> list[str]:
    """What to do to `job` to make `other` of it, in words; one entry for each change."""
    steps = []
    if other.method != job.method:
        base = " on a 4-bit base" if other.quantization and not job.quantization else ""
        steps.append(f"train {other.method}{base} instead of {job.method}")
    elif other.quantization != job.quantization:
        steps.append(
            f"quantize the base ({other.quantization})" if other.quantization else "leave the base unquantized"
        )
    if other.gpus != job.gpus:
        steps.append(f"share it by {other.gpus} GPUs (FSDP)" if other.gpus > 1 else "take one GPU")
    if other.batch != job.batch:
        size = {2: "halve the batch", 4: "quarter the batch"}.get(job.batch / other.batch, "change the batch")
        steps.append(f"{size} ({other.batch} row{'s' * (other.batch > 1)}, {other.accumulate} passes a step)")
    elif other.accumulate != job.accumulate:
        steps.append(f"add up {other.accumulate} passes a step")
    if other.checkpointing != job.checkpointing:
        steps.append(f"turn checkpointing {'on' if other.checkpointing else 'off'}")
    for name, words in (("seq", "cut rows at {} tokens"), ("r", "take rank {}"), ("attention", "take {} attention"),
                        ("optimizer", "take {} as optimizer"), ("library", "use {}'s layers")):
        if getattr(other, name) != getattr(job, name):
            steps.append(words.format(getattr(other, name)))
    return steps


def nearest(job: Job, judge: Judge, most: int = 3, sharing: bool = False, exact: bool = True) -> Verdict | None:
    """The fitting configuration nearest to `job`: fewest changes that alter what is trained, then fewest changes.

    None if nothing within `most` changes fits. More GPUs are proposed only with `sharing`. exact=False: nothing is
    simulated, and only what the formula is sure of counts.
    """
    known = [fields for fields in changes(job) if sharing or "gpus" not in fields]
    chosen = [several for n in range(1, most + 1) for several in combinations(known, n)]
    seen = {key_of(job)}
    for several in sorted(chosen, key=lambda several: (sum(map(alters, several)), len(several))):
        fields = [item for each in several for item in each.items()]
        if len(fields) != len(dict(fields)):                   # two values for one field
            continue
        try:
            other = job.but(**dict(fields))
            if key_of(other) in seen:
                continue
            seen.add(key_of(other))
            verdict = judge(other) if exact else judge.by_formula(other)
        except ValueError:                                     # not a combination that exists
            continue
        if verdict.fits:
            return verdict
    return None


def alters(fields: dict[str, Any]) -> bool:
    """Whether a change alters what is trained, or needs more machines: not only how one step is computed."""
    return bool({"method", "quantization", "seq", "gpus", "r"} & set(fields)) or fields.get("optimizer", "").endswith(
        "8bit"
    )


def distance(job: Job, other: Job) -> tuple[int, int]:
    """(changes that alter what is trained, changes) from one to the other."""
    names = ("method", "seq", "gpus", "r", "attention", "optimizer", "library", "checkpointing", "batch")
    changed = [{name: getattr(other, name)} for name in names if getattr(other, name) != getattr(job, name)]
    if other.method == job.method and other.quantization != job.quantization:
        changed.append({"quantization": other.quantization})
    return sum(map(alters, changed)), len(changed)


def nearest_in(plan: Plan, option: Option) -> Verdict | None:
    """The fitting option of the plan that is nearest to this one; of several, the better one."""
    ranked = [(distance(option.job, other.job), n, other) for n, other in enumerate(plan.fitting)]
    return min(ranked, key=lambda item: item[:2])[2].verdict if ranked else None


def advice(verdict: Verdict, judge: Judge, better: Verdict | None = None, exact: bool = True) -> str:
    """The nearest fitting configuration (`better`, or found here) and what it needs, or that there is none."""
    job = verdict.job
    better = better or nearest(job, judge, exact=exact) or nearest(job, judge, most=2, sharing=True, exact=False)
    if better is None:
        name, size = largest_term(verdict.memory)
        return (f"Nothing within three changes fits, nor on 8 GPUs: {in_words(name, job, verdict.memory)} "
                f"{_is(name)} {gib(size)} as it is. Take a smaller model or a larger GPU.")
    steps = in_steps(job, better.job)
    said = ", ".join(steps[:-1]) + " and " + steps[-1] if len(steps) > 1 else steps[0]
    return f"{said[0].upper()}{said[1:]}: that needs {gib(better.needs)}."


def _is(term: str) -> str:
    return "is" if term in ("adapter", "temporary", "optimizer", "activations") else "are"


# ------------------------------------------------------------------------------------------------ why an option loses

def why(plan: Plan, option: Option) -> str:
    """Why `option` is where it is in `plan`."""
    best = plan.best
    if option.fits is False:
        help = advice(option.verdict, plan.judge, nearest_in(plan, option), exact=False)
        return f"{too_much(option.verdict, plan.budget)}. {help}"
    if option is best:
        return f"the best: needs {gib(option.needs)}, {gib(option.room)} are left ({decided(option)})"
    known = ("the formula does not know it" if option.verdict.memory is None else
             f"near the edge ({gib(option.verdict.low)} to {gib(option.verdict.high)} by the formula)")
    edge = "" if option.fits else f"{known}, not simulated, for "
    if best is None:                                           # nothing is known to fit
        return f"{edge}nothing was found to fit"
    if plan.by_method.get(option.job.method) is option:
        return (
            f"the best {option.job.method}: needs {gib(option.needs)}, {gib(option.room)} are left "
            f"({decided(option)}); "
            f"beside the first, {difference(plan, option, best)}"
        )
    return f"{edge}{difference(plan, option, best)} ({decided(option)})"


def decided(option: Option) -> str:
    return (
        {"formula": "the formula decides", "simulator": "simulated"}[option.by]
        if option.fits is not None
        else "undecided"
    )


def difference(plan: Plan, option: Option, best: Option) -> str:
    """The first criterion in which `option` differs from `best`, with both values."""
    name = next((name for name in plan.order if option.criterion(name) != best.criterion(name)), None)
    job = option.job
    if name == "gpus":
        return f"it takes {job.gpus} GPUs where {best.job.gpus} will do"
    if name == "approximations":
        extra = [each for each in option.approximations if each not in best.approximations] or list(
            option.approximations
        )
        return "; ".join(extra)
    if name == "flops":
        parts = []
        if job.checkpointing and not best.job.checkpointing:
            parts.append("checkpointing runs the layers twice")
        if job.method == "full" != best.job.method:
            parts.append("it also computes the gradients of all weights")
        reason = (
            f" ({', '.join(parts)})"
            if parts
            else f" ({job.method} instead of {best.job.method})"
            if job.method != best.job.method
            else ""
        )
        ratio = option.cost.flops / best.cost.flops
        more = f"{100 * (ratio - 1):.2g} % more arithmetic than" if ratio < 1.1 else f"{ratio:.2f} × the arithmetic of"
        return f"{more} the best{reason}"
    if name == "passes":
        return f"{option.cost.passes} passes for one step, where {best.cost.passes} will do"
    if name == "host":
        return "its optimizer may page to the host, and need not"
    if name == "serving":
        tasks = f"{plan.tasks} tasks take" if plan.tasks > 1 else "it takes"
        return f"{tasks} {gb(resident(option.ways))} to serve, and {gb(resident(best.ways))} with the best"
    if name == "needs":
        return f"{gib(option.room)} are left, {gib(best.room)} with the best"
    return "it ties with the best in everything that is computed"
