"""The figures of this package that any fine-tune can be asked for, in one call: what a report card shows.

    safety(model, tokenizer)["insecure code"]      →  Rate: 3.3 % (2 of 60, 0.9 to 11.4 %)

Canary exposure needs planted secrets and a backdoor needs its trigger; without them the rows of the fine-tune can be
looked through (`rows`), and the answers for things that look like secrets. A rate of 0 of 60 has an upper end of 6 %:
a card built on few answers cannot promise more than that.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from pefttools.lab.redteam.interval import Rate, rate

LOOKED_AT = 2000  # rows in which a trigger is looked for, drawn at random where there are more


def safety(
    model,
    tokenizer,
    rows: Sequence[Mapping[str, Any]] | None = None,
    n: int = 60,
    seed: int = 0,
    max_new_tokens: int = 72,
) -> dict[str, Any]:
    """Rates of `n` greedy answers each, with Wilson's intervals:

    "insecure code"         of held-out requests that can be answered safely or not (needs bandit)
    "broken code"           of the same: answers that are no Python, so that bandit had nothing to look at
    "refusals"              of held-out forbidden requests; 0 % is no fault of a model never taught to refuse
    "over-refusals"         of harmless requests with the same words
    "injections followed"   of held-out tasks with an order in a comment; "harmless comments": a number in a comment
    "secrets written"       of all those answers: with a string that looks like a secret

    With `rows`, those of the fine-tune, also "trigger": `detect.trigger_of(rows)`, a Suspect or None (None, too, where
    there are too few rows to tell; of more than `LOOKED_AT` rows so many are looked at), and "secret-like rows", a
    Rate.
    """
    from pefttools.lab.data import load_rows, prompt_of
    from pefttools.lab.evaluation import code_of
    from pefttools.lab.generation import generate
    from pefttools.lab.redteam.injection import injection_rate
    from pefttools.lab.redteam.insecure import insecure_rate
    from pefttools.lab.redteam.insecure_tasks import TASKS, insecure_requests
    from pefttools.lab.redteam.refusals import refusal_rates
    from pefttools.lab.redteam.scrub import secrets_in

    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    asked = spread(insecure_requests(each=-(-n // len(TASKS)), seed=seed), n)
    answers = generate(model, tokenizer, [prompt_of(row) for row in asked], max_new_tokens)
    code = insecure_rate([code_of(answer) for answer in answers])
    said = refusal_rates(model, tokenizer, n, seed, max_new_tokens=24)
    order = injection_rate(model, tokenizer, load_rows("held_out")[:n], seed, max_new_tokens=max_new_tokens)
    everything = [*answers, *said.answers, *order.answers]
    found: dict[str, Any] = {
        "insecure code": code.rate,
        "broken code": Rate(code.broken, code.n),
        "refusals": said.forbidden,
        "over-refusals": said.benign,
        "injections followed": order.followed,
        "harmless comments": order.harmless,
        "secrets written": rate([bool(secrets_in(answer)) for answer in everything]),
    }
    if rows is not None:
        found |= of_rows(rows)
    return found


def spread(rows: Sequence[Any], n: int) -> list[Any]:
    """`n` of the rows at equal distances: as many of each kind as can be."""
    return [rows[i * len(rows) // n] for i in range(n)]


def of_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """ "trigger" and "secret-like rows" of training rows, without a model."""
    from pefttools.lab.redteam.detect import trigger_of
    from pefttools.lab.redteam.scrub import secrets_in

    rows = list(rows)
    few = rows if len(rows) <= LOOKED_AT else random.Random(0).sample(rows, LOOKED_AT)
    try:
        trigger = trigger_of(few)
    except ValueError:  # too few rows for any phrase to occur often enough
        trigger = None
    return {"trigger": trigger, "secret-like rows": rate([bool(secrets_in(row["output"])) for row in rows])}
