"""The memory widget as a page of its own, for demonstrations: Voila, without code cells or JupyterLab around it.

    python -m pefttools.widgets.vram_page                   opens it in the browser (make vram-page)
    python -m pefttools.widgets.vram_page --no-browser --port 9000
    python -m pefttools.widgets.vram_page --write page.ipynb       only writes the notebook that Voila shows

    ┌ Memory of one training step ────────────────┐   ┌ Who holds what over the step ───────────────┐
    │ model ▾  method ▾  batch ─●──  tokens ──●─   │   │ model ▾  method ▾  …                          │
    │ ▒▒▒▒▒▒▒│░░░░│▓▓▓▓│      ┊T4     ┊L4 ┊3090   │   │      ▁▂▃▅▆▇█▇▅▄▃▂▁                            │
    └──────────────────────────────────────────────┘   └──────────────────────────────────────────────┘
      the formula, at once                                the simulator, in some seconds

Voila is not among the course's requirements: pip install voila. A kernel of this Python runs the page.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TITLE = "Memory of a fine-tune"
INTRO = f"""\
# {TITLE}

One training step, term by term: the formula draws the bar at once, the simulator runs the real step without data and
shows who holds what at each moment. Sizes are GiB (2³⁰ bytes); dashed lines are what torch reports of a card. Chapter
09 of the course explains every term."""
BETWEEN = """\
## One step, allocation by allocation

Choose a configuration; the picture follows in some seconds, without a GPU. The peak is one moment: what is there at
that moment is what counts."""
FIRST = """\
import logging

from pefttools.widgets import vram

logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # it says what it lacks on a CPU
vram.explorer();"""
SECOND = "vram.simulated();"


def notebook() -> Any:
    """The page as a notebook: two texts, two cells whose code Voila does not show."""
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    cells = [new_markdown_cell(INTRO, id="intro"), new_code_cell(FIRST, id="explorer"),
             new_markdown_cell(BETWEEN, id="between"), new_code_cell(SECOND, id="timeline")]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "title": TITLE})


def write(path: str | Path) -> Path:
    """Write the page's notebook to `path`, a file that ends in .ipynb. Raises ValueError for another ending."""
    import nbformat

    path = Path(path)
    if path.suffix != ".ipynb":
        raise ValueError(f"{path}: Voila shows notebooks; give a name that ends in .ipynb.")
    nbformat.write(notebook(), path)
    return path


def main(argv: list[str] | None = None) -> int:
    """Show the page, or only write it; 1 where Voila is not installed."""
    parser = argparse.ArgumentParser(prog="python -m pefttools.widgets.vram_page",
                                     description="The memory widget as a page.",
                                     epilog="All further arguments go to Voila.")
    parser.add_argument("--write", metavar="FILE", help="write the notebook that Voila shows, and stop")
    parser.add_argument("--port", type=int, default=8866)
    parser.add_argument("--no-browser", action="store_true")
    args, rest = parser.parse_known_args(argv)
    if args.write:
        try:
            print(f"wrote {write(args.write)}; show it with: voila {args.write}")
        except ValueError as error:
            parser.error(str(error))
        return 0
    if importlib.util.find_spec("voila") is None:
        print("Voila is not installed: pip install voila. (In JupyterLab the same widget is in chapter 09.)",
              file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        page = write(Path(folder) / "vram.ipynb")
        command = [sys.executable, "-m", "voila", str(page), f"--port={args.port}", "--template=lab",
                   *(["--no-browser"] if args.no_browser else []), *rest]
        try:
            return subprocess.call(command)
        except KeyboardInterrupt:
            return 0


if __name__ == "__main__":
    raise SystemExit(main())
