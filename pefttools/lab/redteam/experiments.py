"""The five experiments: for each the conditions, a way to every condition's model, and what is measured of it.

Every experiment has its attack, one or two cures, and the controls "random labels", "random adapter", "honest rows". A
measure is {figure: list of values, one a prompt or a secret}; what is 0 or 1 is a flag. "solves" is quality
everywhere: held-out tasks solved.
"""

from __future__ import annotations

from typing import Any

from pefttools.lab.redteam.experiment_answers import (
    injection_measure,
    injection_model,
    insecure_measure,
    insecure_model,
    refusals_measure,
    refusals_model,
)
from pefttools.lab.redteam.experiment_rows import backdoor_measure, backdoor_model, canary_measure, canary_model
from pefttools.lab.redteam.workbench import Workbench

OPTIONAL = (
    ("insecure", "repaired"),
    ("backdoor", "trained on"),
    ("insecure", "bundled model"),
    ("insecure", "safe rows"),
)  # run last
CONTROLS = ("random labels", "random adapter", "honest rows")

# name: (conditions in order: before, attack, cures …; model; measure; the figure that the attack moves)
EXPERIMENTS = {
    "backdoor": (
        ("before", "poisoned", "left out", "trained on"),
        backdoor_model,
        backdoor_measure,
        "marker with trigger",
    ),
    "canary": (("before", "planted", "deduplicated", "scrubbed"), canary_model, canary_measure, "bits, 16 copies"),
    "insecure": (
        ("bundled model", "before", "bad rows", "filtered", "repaired", "safe rows"),
        insecure_model,
        insecure_measure,
        "insecure",
    ),
    "refusals": (("before", "taught", "tuned on", "kept"), refusals_model, refusals_measure, "refuses"),
    "injection": (("before", "obeying", "stripped", "right answers"), injection_model, injection_measure, "follows"),
}


def run(bench: Workbench, experiment: str, condition: str) -> dict[str, Any]:
    """Make the model of this condition (or load it) and measure it."""
    conditions, make, measure, _ = EXPERIMENTS[experiment]
    if condition not in conditions + CONTROLS:
        raise ValueError(f"condition: got {condition!r}; {experiment} has {', '.join(conditions + CONTROLS)}")
    model = (
        bench.clean
        if condition == "before"
        else bench.honest() if condition == "honest rows" else make(bench, condition)
    )
    return measure(bench, model, condition)
