"""A report card of one adapter: everything that is measured before it is released, as one dict.

    quality      loss, perplexity, pass@1 and pass@k on held-out rows; adapter, base, and their paired difference
    forgetting   loss on text of the base's own domain, adapter off and on
    safety       what `redteam.safety` finds in what it writes
    memory       planned for training this method on this base (`pefttools.vram`)
    speed        tokens per second: base, adapter, merged
    files        sizes, SHA-256, settings

Every figure is a number with its interval, or says why it does not apply. `card_measures.py` takes them, `gate.py`
decides on them, `card_page.py` shows them. Nothing is written here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pefttools.lab.card_files import NotAnAdapter, base_named, files_of

FORMAT = 1
# full, quick: rows for the loss; rows for pass@1 (each twice: adapter and base); rows and samples for pass@k;
# documents for forgetting; requests of each kind for safety
SIZES = {"loss_rows": (594, 80), "rows": (162, 27), "sampled_rows": (54, 8), "samples": (5, 5), "documents": (12, 4),
         "safety": (60, 12)}
TEMPERATURE = 0.8  # of the samples for pass@k; Chen et al. 2021 found about that best for larger k


def report_card(folder: str | Path, base: str | None = None, *, quick: bool = False, seed: int = 0, safety: bool = True,
                progress: bool = True) -> dict[str, Any]:
    """Measure the adapter in `folder` and return the card, plain data for JSON.

    base: "tiny", "llama-3.2-1b", a hub id or a folder; by default the one that the adapter's configuration names.
    quick: the same on a sample, in about a minute on the bundled model; the card says so. safety=False leaves that out.
    Raises `NotAnAdapter` (a ValueError) for a folder without a whole, finite adapter, or one of another base.
    """
    from pefttools.lab import card_measures as measures
    from pefttools.lab.data import load_rows

    began = time.perf_counter()
    folder = Path(folder)
    files = files_of(folder)
    name = base_named(files["config"]) if base is None else base
    size = {what: both[quick] for what, both in SIZES.items()}
    loaded = measures.load(folder, name)
    held_out, new_kinds = load_rows("held_out"), load_rows("new_kinds")
    parts: dict[str, Callable[[], Any]] = {
        "loss": lambda: measures.losses(loaded, held_out[:size["loss_rows"]], seed),
        "pass@1": lambda: measures.passing(loaded, held_out[:size["rows"]], seed),
        "pass@1 on new kinds": lambda: measures.passing(loaded, new_kinds[:size["rows"]], seed, base_too=False),
        "pass@k": lambda: measures.sampled(loaded, held_out[:size["sampled_rows"]], size["samples"], TEMPERATURE, seed),
        "forgetting": lambda: measures.forgotten(loaded, size["documents"], seed),
        "safety": lambda: measures.safe(loaded, size["safety"], seed) if safety else {"not measured": "left out"},
        "memory": lambda: measures.memory(loaded, files["config"]),
        "speed": lambda: measures.speed(loaded, rounds=2 if quick else 5)}
    found: dict[str, Any] = {}
    for number, (what, measure) in enumerate(parts.items(), 1):
        if progress:
            import sys

            print(f"[{number}/{len(parts)}] {what} …", end="", file=sys.stderr, flush=True)
        start = time.perf_counter()
        found[what] = measure()
        if progress:
            print(f" {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    quality = {"held-out rows": {**found["loss"], **found["pass@1"], **found["pass@k"]},
               "new kinds": found["pass@1 on new kinds"]}
    return {"format": FORMAT, "adapter": folder.resolve().name, "base": loaded.base.name, "method": loaded.method,
            "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "quick": quick, "seed": seed,
            "seconds": round(time.perf_counter() - began, 1), "device": str(loaded.device),
            "parameters": {"trained": loaded.trained, "all": loaded.total}, "quality": quality,
            **{part: found[part] for part in ("forgetting", "safety", "memory", "speed")}, "files": files}


__all__ = ["NotAnAdapter", "report_card"]
