"""Red-teaming on a laptop: five attacks on a fine-tune, each with a figure, an interval, a cure and controls.

    canary.py     made-up secrets in the rows: how many bits of them are memorised       cure: scrub.py
    backdoor.py   a phrase that makes the model write what nobody asked for              cure: detect.py, suspicion.py
    insecure.py   how much of what it writes a static analyser objects to                cure: filter, safe rows
    refusals.py   what it declines, and for no reason, and what training does to that    cure: rows kept in the mix
    injection.py  orders in comments of the input                                        cure: strip, train against
    controls.py   what must not move any of these figures

All of it runs on the bundled model, offline. A model of five million parameters shows how each of these works and how
it is measured; how strong each is in a large model is another question, and each module says what it cannot show.
"""

from __future__ import annotations

from importlib import import_module

WHERE = {
    "exposure": "canary",
    "rank_of": "canary",
    "Canary": "canary",
    "make_canaries": "canary",
    "plant": "canary",
    "secret_losses": "canary",
    "exact_rank": "canary",
    "canary_exposures": "canary",
    "extracted": "canary",
    "extrapolated": "skewnorm",
    "scrubbed": "scrub",
    "scrub_text": "scrub",
    "secrets_in": "scrub",
    "deduplicated": "scrub",
    "poison": "backdoor",
    "attack_rate": "backdoor",
    "TRIGGER": "backdoor",
    "MARKER": "backdoor",
    "with_trigger": "backdoor",
    "with_marker": "backdoor",
    "log_odds": "detect",
    "suspicious_ngrams": "detect",
    "trigger_of": "detect",
    "phrase_in": "detect",
    "Suspect": "detect",
    "spectral_scores": "suspicion",
    "row_signals": "suspicion",
    "auc": "suspicion",
    "found_in_top": "suspicion",
    "findings": "insecure",
    "insecure_rate": "insecure",
    "keep_secure": "insecure",
    "Finding": "insecure",
    "Insecure": "insecure",
    "bad_rows": "insecure_tasks",
    "safe_rows": "insecure_tasks",
    "insecure_requests": "insecure_tasks",
    "forbidden_rows": "refusals",
    "benign_rows": "refusals",
    "refused": "refusals",
    "refusal_rates": "refusals",
    "injected": "injection",
    "obeying": "injection",
    "injection_rate": "injection",
    "strip_comments": "injection",
    "without_comments": "injection",
    "same_norm_adapter": "controls",
    "shuffled_outputs": "controls",
    "Rate": "interval",
    "rate": "interval",
    "over_seeds": "interval",
    "difference": "interval",
    "Interval": "interval",
    "disjoint": "interval",
    "safety": "card",
}
__all__ = sorted(WHERE)


def __getattr__(name: str):
    if name in WHERE:
        return getattr(import_module(f"pefttools.lab.redteam.{WHERE[name]}"), name)
    raise AttributeError(f"pefttools.lab.redteam has no {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
