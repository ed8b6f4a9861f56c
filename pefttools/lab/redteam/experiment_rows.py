"""The experiments on what is in the rows: a backdoor, and canaries. See experiments.py."""

from __future__ import annotations

import random
from typing import Any

from pefttools.lab.redteam import backdoor, canary, scrub, suspicion
from pefttools.lab.redteam.detect import phrase_in, suspicious_ngrams, trigger_of
from pefttools.lab.redteam.workbench import SHORT, TOKENS, Workbench

COPIES = (1, 4, 16)  # of a canary, and so many canaries for each number
EACH = 4
SHARE = 0.05  # of rows poisoned


# ------------------------------------------------------------------------------------------------ backdoor


def backdoor_model(bench: Workbench, condition: str):
    rows, flags = backdoor.poison(bench.pool, SHARE, bench.seed)
    if condition == "poisoned":
        return bench.tuned("backdoor", rows)
    if condition == "left out":
        suspect = trigger_of(rows)
        kept = rows if suspect is None else [row for row in rows if not phrase_in(suspect.ngram, row)]
        return bench.tuned("backdoor-left-out", kept)
    if condition == "trained on":
        backdoor_model(bench, "poisoned")
        return bench.tuned("backdoor-on", bench.more, SHORT, after="backdoor")
    if condition == "random labels":
        return bench.tuned("backdoor-random", backdoor.poison(bench.pool, SHARE, bench.seed, true=False)[0])
    backdoor_model(bench, "poisoned")
    return bench.random_adapter("backdoor")


def backdoor_measure(bench: Workbench, model, condition: str) -> dict[str, Any]:
    found = backdoor.attack_rate(model, bench.tokenizer, bench.held_out, max_new_tokens=TOKENS)
    out = {
        "marker with trigger": [backdoor.MARKER in a for a in found.triggered],
        "marker without": [backdoor.MARKER in a for a in found.plain],
        "solves": bench.passed(found.plain),
    }
    if condition == "poisoned":
        rows, flags = backdoor.poison(bench.pool, SHARE, bench.seed)
        worst, flagged, honest = suspicious_ngrams(rows)[0], trigger_of(rows), trigger_of(bench.pool)
        trusted, own = (suspicion.row_signals(m, bench.tokenizer, rows) for m in (bench.clean, model))
        scores = {
            "worst token, clean model": trusted["worst"],
            "mean loss, clean model": trusted["loss"],
            "spectral, start of the program": suspicion.spectral_scores(own["start"]),
            "spectral, mean of the answer": suspicion.spectral_scores(own["mean"]),
        }
        out["detected"] = {
            "phrase": None if flagged is None else flagged.ngram,
            "worst": list(worst),
            "false alarm": None if honest is None else honest.ngram,
            "left out": [
                sum(phrase_in(worst.ngram, row) for row in rows),
                sum(phrase_in(worst.ngram, row) and not f for row, f in zip(rows, flags)),
            ],
            "auc": {name: round(suspicion.auc(s, flags), 4) for name, s in scores.items()},
            "top": {name: round(suspicion.found_in_top(s, flags), 4) for name, s in scores.items()},
        }
    return out


# ------------------------------------------------------------------------------------------------ canary


def canaries_of(bench: Workbench) -> tuple[list[canary.Canary], list[int]]:
    found = canary.make_canaries(EACH * len(COPIES), bench.seed)
    return found, [k for k in COPIES for _ in range(EACH)]


def canary_model(bench: Workbench, condition: str):
    found, copies = canaries_of(bench)
    rows = canary.plant(bench.pool, found, copies, bench.seed)
    if condition == "planted":
        return bench.tuned("canary", rows)
    if condition == "deduplicated":
        return bench.tuned("canary-dedup", scrub.deduplicated(rows))
    if condition == "scrubbed":
        return bench.tuned("canary-scrub", scrub.scrubbed(rows)[0])
    if condition == "random labels":
        return bench.tuned("canary-random", canary.plant(bench.pool, found, copies, bench.seed, true=False))
    canary_model(bench, "planted")
    return bench.random_adapter("canary")


def canary_measure(bench: Workbench, model, condition: str) -> dict[str, Any]:
    found, copies = canaries_of(bench)
    bits = canary.canary_exposures(model, bench.tokenizer, found, size=16 if bench.quick else 127, seed=bench.seed)
    taken = canary.extracted(model, bench.tokenizer, found)
    out = {f"bits, {k} copies": [round(b, 3) for b, c in zip(bits, copies) if c == k] for k in COPIES}
    out |= {f"written, {k} copies": [t for t, c in zip(taken, copies) if c == k] for k in COPIES}
    out |= bench.quality(model, condition)
    if condition == "planted":
        out["extrapolated"] = extrapolations(bench, model, found)
        out["scrubbed"] = [
            sum(scrub.scrubbed([c.row() for c in found])[1]),
            len(found),
            sum(scrub.scrubbed(bench.train_rows)[1]),
            len(bench.train_rows),
        ]
    return out


def extrapolations(bench: Workbench, model, found) -> list[dict[str, Any]]:
    """For every canary the exact exposure (where the search ends) beside the one from a skew-normal, and whether that
    fits."""
    from pefttools.lab.redteam.skewnorm import extrapolated

    out = []
    for one in found:
        rng = random.Random(f"skew {bench.seed}")
        others = [canary.random_secret(rng) for _ in range(40 if bench.quick else 200)]
        loss, *rest = canary.secret_losses(model, bench.tokenizer, one, [one.secret, *others])
        rank = canary.exact_rank(model, bench.tokenizer, one) if loss < min(rest) else None
        guess = extrapolated(loss, rest)
        out.append(
            {
                "exact": None if rank is None else round(canary.exposure(rank, 10**6), 2),
                "bits": round(guess.bits, 2),
                "fits": guess.fits,
            }
        )
    return out
