"""A report card as one HTML page: stands alone, without a script and without the network, and fits a phone.

Every text from outside (folder names, settings, kinds, errors) goes through `html.escape`. A figure is a dot with its
interval as a line; base and adapter differ by shape and by word, not by colour alone, and each picture says in words
(`role="img"`, `aria-label`) what it shows.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

STYLE = """
:root{color-scheme:light;--ink:#1b1f24;--soft:#57606a;--line:#d0d7de;--thin:#eef1f4;
--ours:#0072B2;--base:#8a5200;--good:#0b6b43;--bad:#a12d00}
*{box-sizing:border-box}
body{margin:0 auto;max-width:52rem;padding:1rem;font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:#fff}
h1{font-size:1.5rem;margin:.2rem 0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2rem 0 .4rem;border-bottom:1px solid var(--line)}
p{margin:.4rem 0}.soft{color:var(--soft);font-size:.9rem}code{overflow-wrap:anywhere;font-size:.9em}
.verdict{border:2px solid;border-radius:.5rem;padding:.6rem 1rem;margin:1rem 0;font-size:1.15rem;font-weight:600}
.yes{color:var(--good);border-color:var(--good)}.no{color:var(--bad);border-color:var(--bad)}
.row{display:grid;grid-template-columns:15rem 1fr 13rem;gap:.2rem 1rem;align-items:center;padding:.3rem 0}
.row,td,th{border-bottom:1px solid var(--thin)}.row b{font-weight:600}
.num{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.why{grid-column:1/-1;color:var(--soft);font-size:.9rem}
.scale{display:flex;justify-content:space-between;color:var(--soft);font-size:.8rem}
svg{display:block;width:100%;height:20px;overflow:visible}
table{border-collapse:collapse;width:100%}
td,th{text-align:left;padding:.25rem .5rem .25rem 0;vertical-align:top;overflow-wrap:anywhere}
td.num,th.num{text-align:right;white-space:nowrap;padding-right:0}
@media(max-width:40rem){.row{grid-template-columns:1fr auto}.row .plot{grid-column:1/-1;grid-row:2}
.row code{grid-column:1/-1}.why{grid-row:3}}
@media print{body{max-width:none}}
"""
SHAPES = {"adapter": ("●", "ours"), "base": ("■", "base"), "difference": ("◆", "ours")}


def to_html(card: dict[str, Any]) -> str:
    """The page of a `report_card` with the gate's verdicts in it (`gate`, `released`)."""
    ran = card["quality"]["held-out rows"].get("programs ran in")
    where = "in a sandbox" if ran == "sandbox" else "in a subprocess with limits, without a sandbox"
    parts = [head(card), verdict(card), section("Quality", quality(card["quality"])),
             section("Forgetting", forgetting(card["forgetting"])), section("Safety", safety(card["safety"])),
             section("Memory", memory(card["memory"])), section("Speed", speed(card["speed"])),
             section("Files", files(card["files"])),
             f"<p class='soft'>Programs ran {where}. Intervals are of 95 %, over the rows that were drawn; another "
             f"training run could lie outside. Made {text(card['made'])}, seed {text(card['seed'])}, in "
             f"{text(card['seconds'])} s on {text(card['device'])}.</p>"]
    return ("<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
            "<meta name='viewport' content='width=device-width, initial-scale=1'>"
            "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'\">"
            f"<title>Report card: {text(card['adapter'])}</title><style>{STYLE}</style></head><body>\n"
            + "\n".join(parts) + "\n</body></html>\n")


def text(value: Any) -> str:
    return escape(str(value), quote=True)


def section(title: str, inside: str) -> str:
    return f"<section><h2>{text(title)}</h2>{inside}</section>"


def head(card: dict) -> str:
    sample = "<p><b>A sample only (--quick):</b> the intervals are wide, and a release wants the full card.</p>"
    trained, every = card["parameters"]["trained"], card["parameters"]["all"]
    return (f"<h1>Report card: {text(card['adapter'])}</h1><p>{text(card['method'])} on <b>{text(card['base'])}</b>: "
            f"{trained:,} of {every:,} parameters, {100 * trained / every:.2f} %.</p>{sample if card['quick'] else ''}")


def verdict(card: dict) -> str:
    yes, failed = card.get("released"), [v["condition"] for v in card.get("gate", []) if v["passed"] is False]
    said = "✓ May be released: every condition that could be checked is met." if yes else \
        "✗ Not to be released: " + (text(", ".join(failed)) or "no condition could be checked") + "."
    words = {True: "✓ met", False: "✗ not met", None: "– left out"}
    rows = []
    for v in card.get("gate", []):
        number = "not measured" if v["value"] is None else f"{v['value']:.3g} ({v['low']:.3g} to {v['high']:.3g})"
        rows.append(f"<div class='row'><code>{text(v['condition'])}</code><span>{words[v['passed']]}</span>"
                    f"<span class='num'>{text(number)}</span><span class='why'>{text(v['why'])}</span></div>")
    return f"<div class='verdict {'yes' if yes else 'no'}'>{said}</div>" + section("The gate", "".join(rows))


# ------------------------------------------------------------------------------------------------ figures

def dot(found: dict, low: float, high: float, who: str, said: str) -> str:
    """A dot and its interval on the scale from `low` to `high`, as an image with its meaning in words."""
    def at(x: float) -> str:
        return f"{100 * min(1.0, max(0.0, (x - low) / ((high - low) or 1))):.2f}%"

    color = f"var(--{SHAPES[who][1]})"
    here = at(found["value"])
    mark = {"base": f"<rect x='{here}' y='5' width='10' height='10' transform='translate(-5 0)' fill='{color}'/>",
            "adapter": f"<circle cx='{here}' cy='10' r='5.5' fill='{color}'/>",
            "difference": f"<text x='{here}' y='16' text-anchor='middle' font-size='18' fill='{color}'>◆</text>"}[who]
    zero = f"<line x1='{at(0)}' x2='{at(0)}' y1='0' y2='20' stroke='#8c959f' stroke-dasharray='3 2'/>"
    return (f"<svg role='img' aria-label='{text(said)}'><title>{text(said)}</title>"
            f"<line x1='0' x2='100%' y1='10' y2='10' stroke='#d8dee4'/>{zero if low < 0 < high else ''}"
            f"<line x1='{at(found['low'])}' x2='{at(found['high'])}' y1='10' y2='10' stroke='{color}' "
            f"stroke-width='3'/>{mark}</svg>")


def plots(rows: Iterable[tuple[str, str, dict]], style: str = "percent", low: float | None = None,
          high: float | None = None) -> str:
    """Rows of (label, who, figure) on one scale. style: "percent", "number" or "speed"."""
    rows = list(rows)
    digits, unit, times = {"percent": (1, " %", 100), "number": (3, "", 1), "speed": (0, "", 1)}[style]

    def show(x: float) -> str:
        return f"{times * x:.{digits}f}"

    known = [found for _, _, found in rows if "value" in found]
    ends = [end for found in known for end in (found["low"], found["high"])] or [0.0, 1.0]
    low = min([0.0, *ends]) if low is None else low
    high = max(ends) if high is None else high
    out = []
    for label, who, found in rows:
        if "value" not in found:
            why = f"<span class='plot soft'>{reason(found)}</span>"
            out.append(f"<div class='row'><b>{text(label)}</b>{why}</div>")
            continue
        number = f"{show(found['value'])}{unit} ({show(found['low'])} to {show(found['high'])})"
        out.append(f"<div class='row'><b>{SHAPES[who][0]} {text(label)}</b><span class='plot'>"
                   f"{dot(found, low, high, who, f'{label}: {number}')}</span>"
                   f"<span class='num'>{text(number)}</span></div>")
    ends = f"<span>scale: {text(show(low))}{unit}</span><span>{text(show(high))}{unit}</span>"
    return "".join(out) + f"<p class='scale'>{ends}</p>"


def reason(found: dict) -> str:
    """Why there is no figure."""
    said = [f"{text(k)}: {text(v)}" for k, v in found.items() if k in ("not applicable", "not measured")]
    return "; ".join(said) or "not measured"


# ------------------------------------------------------------------------------------------------ sections

def quality(found: dict) -> str:
    held_out, new = found["held-out rows"], found["new kinds"]
    rates, drawn = [], next((k for k in held_out if k.startswith("pass@") and k != "pass@1"), None)
    for name in filter(None, ("pass@1", drawn)):
        shown = {"adapter": "adapter", "base": "base", "difference": "adapter − base"}
        rates += [(f"{name}, {word}", who, held_out[name][who]) for who, word in shown.items()]
    rates.append(("pass@1 on new kinds", "adapter", new["pass@1"]["adapter"]))
    loss = held_out["loss"]
    kinds = "".join(f"<tr><td>{text(kind)}</td><td class='num'>{passed} of {n}</td></tr>"
                    for kind, passed, n in held_out.get("worst kinds", []))
    perplexity = held_out["perplexity"]
    sampled = (f" {text(drawn)}: {held_out['rows sampled']} rows, {held_out['samples']} samples each at temperature "
               f"{held_out['temperature']}." if drawn else "")
    low = min(0.0, *(rate["low"] for _, _, rate in rates))
    return (f"<p class='soft'>Programs that pass their tests, of {held_out['rows run']} held-out rows (greedy)."
            f"{sampled} Differences are paired: the same rows for both.</p>{plots(rates, low=low, high=1.0)}"
            f"<p class='soft'>Loss per target token in nats, {held_out['rows']} rows.</p>"
            + plots([("loss, adapter", "adapter", loss["adapter"]), ("loss, base", "base", loss["base"]),
                     ("loss, adapter − base", "difference", loss["difference"])], "number")
            + f"<p>Perplexity {perplexity['adapter']['value']:.2f}, of the base {perplexity['base']['value']:.2f}: "
              "as unsure as among that many equally likely tokens.</p>"
            + (f"<p class='soft'>The kinds of task that fare worst:</p><table>{kinds}</table>" if kinds else ""))


def forgetting(found: dict) -> str:
    note = f"<p class='soft'>{text(found['note'])}</p>" if found.get("note") else ""
    return (f"<p class='soft'>Loss per token in nats on {found['documents']} documents ({found['tokens']:,} tokens) of "
            "the base's own domain, adapter off and on. With the adapter off the base is what it was, bit for bit.</p>"
            + plots([("adapter off", "base", found["before"]), ("adapter on", "adapter", found["after"]),
                     ("on − off", "difference", found["change"])], "number") + note)


def safety(found: dict) -> str:
    if "value" not in str(found):
        return f"<p>{reason(found)}.</p>"
    rows = [(f"{what} ({rate['hits']} of {rate['n']})" if "n" in rate else what, "adapter", rate)
            for what, rate in found.items()]
    return ("<p class='soft'>Shares of greedy answers, with Wilson's intervals. What each one means and cannot mean is "
            "in chapter 10.</p>" + plots(rows, low=0.0, high=1.0))


def memory(found: dict) -> str:
    if "bytes" not in found:
        return f"<p>{reason(found)}.</p>"
    from pefttools.vram.units import human

    terms = "".join(f"<tr><td>{text(name)}</td><td class='num'>{text(human(size))}</td></tr>"
                    for name, size in found["terms"].items())
    return (f"<p>One training step of {text(found['method'])} in {text(found['dtype'])}, {found['batch']} rows of "
            f"{found['seq']} tokens: <b>{text(human(found['bytes']))}</b> planned (by the {text(found['by'])}); full "
            f"fine-tuning {text(human(found['full fine-tuning, bytes']))}.</p><table>{terms}</table>")


def speed(found: dict) -> str:
    rates = found["tokens per second"]
    rows = [(name, "base" if name == "base" else "adapter", rates[name]) for name in ("base", "adapter", "merged")]
    known = [r["high"] for _, _, r in rows if "high" in r]
    return (f"<p class='soft'>Tokens per second, {found['new tokens']} tokens, {found['rounds']} rounds in turn; "
            f"{text(found['note'])}.</p>"
            + plots(rows, "speed", 0.0, max(known, default=1.0)))


def files(found: dict) -> str:
    rows = "".join(f"<tr><td><code>{text(name)}</code></td><td class='num'>{about['bytes']:,} bytes</td></tr>"
                   f"<tr><td colspan='2' class='soft'>SHA-256 <code>{text(about['sha256'])}</code></td></tr>"
                   for name, about in found["files"].items())
    config = "".join(f"<tr><td>{text(name)}</td><td><code>{text(value)}</code></td></tr>"
                     for name, value in found["config"].items())
    return (f"<table>{rows}</table><p class='soft'>{found['tensors']} tensors, {found['numbers']:,} numbers. "
            f"Settings:</p><table>{config}</table>")
