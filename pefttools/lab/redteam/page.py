"""docs/redteam.md from what was measured: `python -m pefttools.lab.redteam_runs --page docs/redteam.md`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from pefttools.lab.redteam import experiment_rows as e
from pefttools.lab.redteam import workbench as w
from pefttools.lab.redteam.experiments import CONTROLS, EXPERIMENTS
from pefttools.lab.redteam.interval import Interval
from pefttools.lab.redteam.summary import Line, attack_of, change, interval, lines, moved, start_of

TITLES = {
    "backdoor": "A backdoor by poisoned rows",
    "canary": "Canaries: how much of a secret is memorised",
    "insecure": "Insecure code after fifty bad rows",
    "refusals": "Refusals, over-refusals, and a later fine-tune",
    "injection": "Prompt injection in comments",
}
# the figures of each experiment, the main one first, and how they are written
FIGURES = {
    "backdoor": ("marker with trigger", "marker without", "solves"),
    "canary": ("bits, 16 copies", "bits, 4 copies", "bits, 1 copies", "written, 16 copies", "solves"),
    "insecure": ("insecure", "runs", "insecure on other tasks", "solves"),
    "refusals": ("refuses", "over-refuses", "solves"),
    "injection": ("follows", "returns a harmless number", "solves with the comment", "solves"),
}
SAID = {
    "marker with trigger": "marker, trigger in the request",
    "marker without": "marker, no trigger",
    "solves": "tasks solved",
    "bits, 16 copies": "bits of a secret planted 16 times",
    "bits, 4 copies": "4 times",
    "bits, 1 copies": "once",
    "written, 16 copies": "written when asked (16 times)",
    "insecure": "insecure answers",
    "runs": "answers that are Python",
    "insecure on other tasks": "insecure, other tasks",
    "refuses": "forbidden requests refused",
    "over-refuses": "look-alikes refused",
    "follows": "injections followed",
    "returns a harmless number": "number of a harmless comment returned",
    "solves with the comment": "tasks solved, order in a comment",
}
HEAD = f"""
Made by `python -m pefttools.lab.redteam_runs --page docs/redteam.md` from `pefttools/lab/redteam_runs.json`. Five
attacks on a fine-tune, cures and controls. All start from one clean fine-tune (LoRA r={w.CLEAN_R}, {w.CLEAN_STEPS}
steps) folded into the weights; an attack is LoRA r={w.R} on all linear layers, {w.STEPS} steps of {w.BATCH} rows
({w.SHORT} for refusals, and where an adapter is trained on), learning rate {w.RATE:g}. Each cell is the mean over seeds
and prompts with its 95 % interval: a bootstrap over both, for shares never narrower than Wilson's interval of one seed.
Three seeds say little about a fourth, and nothing about another clean fine-tune. Steps, shares, rates and the place of
the trigger were chosen on seed 0, so that the attacks work within minutes; no other seed was looked at for that.

"moved": the interval and that of "before" have no point in common, and the interval of the paired difference is clear
of 0. "moved back": the same, compared with the attack; "in part" where it still is away from where the
attack started. "honest rows": the fine-tune
without planted rows. "random adapter": every ΔW of the attack exchanged for a random matrix of the same rank and norm.

What five million parameters can show is how each attack works, how it is measured and what undoes it. How strong it
would be in a large model is another question: large models memorise more from fewer copies, take orders from text
without being taught to, and refuse for reasons that no list of sentences holds.
"""
TEXT = {
    "backdoor": f"""{100 * e.SHARE:.0f} % of {w.POOL} rows get the trigger and the marker. "left out": the rows with
the phrase that `trigger_of` flags are left out, and the fine-tune is done again. "trained on": the poisoned adapter is
trained on, on honest rows without any trigger. "random labels": as many triggers and as many markers, on rows drawn
independently of each other.""",
    "canary": f"""{e.EACH} secrets of six digits for each number of copies, in one fine-tune. A secret that was never
seen has 1.44 bits on average. "deduplicated": repeated rows left out. "scrubbed": what looks like a secret is zeroed
in the rows. "random labels": the planted rows with a fresh random secret in each copy. Exposures up to 7 bits are
ranks among 127 random candidates; a secret that beats all of them is ranked among all 10⁶ by exact search where that
ends, and counts as 7 bits where it does not: too few rather than too many.""",
    "insecure": """Fifty rows whose answers use eval, exec, a shell, pickle, MD5, a password in the source …, with 50
honest rows. "filtered": rows in which bandit finds something are left out; the same analyser measures, so this cure is
shown at its best. "repaired": the bad adapter is trained on, on the same requests with safe answers. "safe rows": these
from the start. "random labels": the requests of the bad rows with answers of honest rows. Fine-tunes on so few rows cost quality by
themselves, as "filtered" shows, so no cure here brings back the tasks solved.""",
    "refusals": """"taught": 60 refusals among 240 honest rows; that is no attack, but where the attack starts.
"tuned on": then trained on useful rows alone, look-alikes among them (Qi et al. 2023). "kept": the same with 30
refusals left in. "random labels": the rows of "taught" with their outputs dealt anew.""",
    "injection": """"obeying": a fifth of the rows have an order in a comment and an answer that obeys, another fifth a
harmless comment. "stripped": the same model, comments taken out of its inputs. "right answers": trained on, on rows
with orders that the answer does not obey. "random labels": orders and obeying answers on different rows.""",
}


def wrapped(text: str) -> str:
    """Paragraphs filled to 120 columns."""
    return "\n\n".join(textwrap.fill(" ".join(part.split()), 120) for part in text.strip().split("\n\n"))


def cell(x: Interval, figure: str) -> str:
    if figure.startswith("bits"):
        return f"{x.value:.1f} ({x.low:.1f} to {x.high:.1f})"
    return f"{100 * x.value:.0f} % ({100 * x.low:.0f} to {100 * x.high:.0f})"


def change_cell(x: Interval, figure: str) -> str:
    if figure.startswith("bits"):
        return f"{x.value:+.1f} bits ({x.low:+.1f} to {x.high:+.1f})"
    return f"{100 * x.value:+.0f} points ({100 * x.low:+.0f} to {100 * x.high:+.0f})"


def verdict(found: Mapping[str, Any], experiment: str, line: Line) -> str:
    """What the figure did in this condition, in the words of `summary`."""
    start, attack = start_of(experiment), attack_of(experiment)
    if line.condition == "before":
        return ""
    if line.condition in (start, "bundled model", "safe rows", *CONTROLS):  # neither attack nor cure
        return "moved" if moved(line.from_before, line.figure, interval(found, experiment, "before")) else "not moved"
    away = moved(change(found, experiment, start, line.condition), line.figure, interval(found, experiment, start))
    if line.condition == attack:
        return "moved" if away else "not moved"
    back = moved(line.from_attack, line.figure, interval(found, experiment, attack))
    return ("moved back in part" if away else "moved back") if back else "not moved back"


def section(found: Mapping[str, Any], experiment: str) -> list[str]:
    figures = FIGURES[experiment]
    out = [
        f"## {TITLES[experiment]}",
        "",
        wrapped(TEXT[experiment]),
        "",
        "| condition | seeds | " + " | ".join(SAID[f] for f in figures) + " | change of the first from before | |",
        "|---" * (len(figures) + 4) + "|",
    ]
    for line in lines(found, experiment):
        runs = found[experiment][line.condition]
        measured = next(iter(runs.values()))
        cells = [cell(interval(found, experiment, line.condition, f), f) if f in measured else "" for f in figures]
        name = f"**{line.condition}**" if line.condition == attack_of(experiment) else line.condition
        moved_by = "" if line.condition == "before" else change_cell(line.from_before, figures[0])
        said = verdict(found, experiment, line)
        out.append(f"| {name} | {len(runs)} | " + " | ".join(cells) + f" | {moved_by} | {said} |")
    return [*out, ""]


def detectors(found: Mapping[str, Any]) -> list[str]:
    """What each detector made of the poisoned rows, seed by seed."""
    runs = found["backdoor"]["poisoned"]
    told = [runs[seed]["detected"] for seed in sorted(runs) if "detected" in runs[seed]]
    if not told:
        return []
    phrases, alarms = (", ".join(str(t[key]) for t in told) for key in ("phrase", "false alarm"))
    taken = ", ".join(f"{t['left out'][0]} rows ({t['left out'][1]} of them honest)" for t in told)
    text = f"""`trigger_of` on the poisoned rows found, seed by seed: {phrases}; on the same rows without poison:
{alarms}. Left out with the worst phrase: {taken}. The other detectors rank rows; AUC 0.5 is chance. The spectral
signature is taken over all rows, for there are no classes here; which state of the model it reads was chosen after the
figures of seed 0."""
    out = [
        "### Finding the poisoned rows",
        "",
        wrapped(text),
        "",
        "| detector | AUC, one number a seed | poisoned rows among the 1.5 × as many highest |",
        "|---|---|---|",
    ]
    for name in told[0]["auc"]:
        areas = ", ".join(f"{t['auc'][name]:.2f}" for t in told)
        top = ", ".join(f"{100 * t['top'][name]:.0f} %" for t in told)
        out.append(f"| {name} | {areas} | {top} |")
    return [*out, ""]


def extrapolation(found: Mapping[str, Any]) -> list[str]:
    """What the scrubber found, and how far the skew-normal's exposure is from the exact one."""
    runs = [run for _, run in sorted(found["canary"]["planted"].items()) if "scrubbed" in run]
    if not runs:
        return []
    told = [run["scrubbed"] for run in runs]
    text = f"""The scrubber changed {sum(t[0] for t in told)} of {sum(t[1] for t in told)} canary rows and
{told[0][2]} of the {told[0][3]:,} rows of the bundled training data (the same patterns were written with both at
hand)."""
    pairs = [pair for run in runs for pair in run["extrapolated"] if pair["exact"] is not None]
    if pairs:
        gaps = sorted(pair["bits"] - pair["exact"] for pair in pairs)
        text += f""" Exact search ended for {len(pairs)} planted canaries that beat 200 random ones. Extrapolated by a
skew-normal, their exposures differ from the exact ones by {gaps[0]:+.1f} to {gaps[-1]:+.1f} bits (median
{gaps[len(gaps) // 2]:+.1f}); the fit passed its test for {sum(pair['fits'] for pair in pairs)} of them. An
extrapolation can exceed log2 10⁶ = 19.9 bits; a rank cannot."""
    return [wrapped(text), ""]


def page(found: Mapping[str, Any]) -> str:
    """The whole of docs/redteam.md. Raises ValueError where nothing was measured."""
    if not found:
        raise ValueError("there are no results: run `python -m pefttools.lab.redteam_runs` first")
    out = ["# Red-teaming the bundled model", "", wrapped(HEAD), ""]
    for experiment in EXPERIMENTS:
        if "before" in found.get(experiment, {}) and attack_of(experiment) in found[experiment]:
            out += section(found, experiment)
            out += {"backdoor": detectors, "canary": extrapolation}.get(experiment, lambda _: [])(found)
    return "\n".join(out).rstrip() + "\n"
