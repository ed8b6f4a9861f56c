"""Every widget of the course, moved in JupyterLab as a reader moves it: the picture changes, and its words follow.

The cell that shows a widget is cut from the built chapter, after the chapter's own imports. What the chapter would have
trained or downloaded by then is stood in for, by the lines of `before` below. A widget of a chapter without a line here
fails `test_no_widget_is_left_out`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import textwrap
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest

from pefttools import widgets

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.browser


@dataclass(frozen=True)
class Move:
    """Move the control with that label, and find these words in the picture's text afterwards (and not before).

    how: an option of a drop-down (its start will do); "click" for a check box; for a slider "left", "right", "drag" or
    a number (see `Page.move`).
    """

    label: str
    how: str
    words: str


@dataclass(frozen=True)
class Widget:
    """What a cell of a chapter shows: the function that it calls, what has to be there before, and what to move."""

    chapter: str
    name: str
    before: str
    moves: tuple[Move, ...]

    def __str__(self) -> str:
        return f"{self.chapter}-{self.name}"


FACTORS = """
image = pictures.sample_image()
o_proj = "model.layers.3.self_attn.o_proj.weight"
weights, deltas = {o_proj: torch.randn(256, 256)}, {o_proj: torch.randn(256, 4) @ torch.randn(4, 256)}
"""
REPORTS = """
from types import SimpleNamespace

asked = ["Add two numbers.", "Sort a list."]
before, after = (SimpleNamespace(rows=[{"instruction": text, "input": "", "kind": "numbers", "error": "NameError",
                                        "passed": passed and i == 0, "answer": answer} for i, text in enumerate(asked)])
                 for passed, answer in ((False, "and so on"), (True, "def add(a, b):\\n    return a + b")))
"""
# six layers of four heads; the head in which the prefix gets most is the third of layer 2
ATTENTION = """
def attention(seed, T=9, P=5):
    scores = torch.randn(6, 4, T, P + T, generator=torch.Generator().manual_seed(seed)).tril(P)
    scores[1, 2, :, :P] += 6
    later = torch.ones(T, P + T).triu(P + 1).bool()
    return scores.masked_fill(later, -math.inf).softmax(-1), "a b c d e f g h i".split()

story, pictures.attention_of = "", lambda *_: attention(0)
(map_before, words), (map_random, _) = attention(1), attention(2)
"""
# layer 0 of the two large ranks agrees, so that it is the first of the list
TRAINED = """
names = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
found = {label: {what: {name: torch.randn(r, 256) for name in names} for what in ("A", "ΔW", "start")}
         for label, r in (("r = 8", 8), ("r = 64", 64), ("r = 64, another seed", 64))}
found["r = 64, another seed"]["A"][names[0]] = found["r = 64"]["A"][names[0]]
"""
SIMULATED = """simulated = simulate("llama-3.2-1b", "lora", 4, 512, targets="all-linear", checkpointing=True)"""
TABLE = """
from types import SimpleNamespace

base = SimpleNamespace(name="tiny")
table = [{"method": method, "measured": memory * 2**20, "trainable": trained, "tokens_per_second": 100 + memory,
          **{what: {"value": value, "low": value - 0.1, "high": value + 0.1} for what in ("loss", "forgetting")}}
         for method, memory, trained, value in (("lora", 120, 40_000, 1.1), ("full", 300, 5_000_000, 0.9),
                                                ("ia3", 90, 5_000, 1.6))]
"""

WIDGETS = (
    Widget("00_start", "memory_explorer", "", (
        Move("billions", "right", "for 8 billion parameters"),
        Move("adapter percent", "right", "frozen in 16 bits + adapter: 17.3 GB"))),
    Widget("01_rank", "elimination_stepper", "", (
        Move("step", "right", "Step 2 of 5"),
        Move("matrix", "fractions", "1/2"))),
    Widget("01_rank", "svd_explorer", FACTORS, (
        Move("matrix", "weight", "weight (layer 3, o_proj) (256 by 256)"),
        Move("k", "32", "nearest matrix of rank 32"))),
    Widget("02_lora", "rank_alpha_explorer", "", (
        Move("rank r", "right", "the first 5 are above zero"),
        Move("α", "drag", "alpha = 64"))),
    Widget("03_finetune", "mask_viewer", 'held_out = load_data("held_out")', (
        Move("row", "2. ", "2. "),
        Move("pad to", "right", "256 tokens"),
        Move("labels", "pad = eos", "Labels: pad = eos"))),
    Widget("03_finetune", "generation_viewer", REPORTS, (
        Move("prompt", "✗", "Prompt: 'Sort a list.'"),)),
    Widget("04_nf4", "explorer", "", (
        Move("spread (standard deviation)", "right", "standard deviation 0.12"),
        Move("outliers in 1000", "2", "2 in 1000"),
        Move("skew", "left", "skew -0.1"),
        Move("block size", "right", "blocks of 256"),
        Move("data type", "FP4", "levels of FP4"))),
    Widget("05_qlora", "bytes_explorer", "", (
        Move("width", "right", "4096 by 4096"),
        Move("r", "right", "rank 64"),
        Move("block size", "right", "blocks of 128"),
        Move("double quant", "click", "scales 0.50"),
        Move("adam bits", "left", "Adam's moments 32.50"))),
    Widget("06_adapters", "block_explorer", "", (
        Move("placement", "pfeiffer", "pfeiffer: after the feed-forward"),
        Move("model", "the bundled", "numbers of the bundled model with m = 64"),
        Move("bottleneck m", "drag", "with m = 256"))),
    Widget("07_prefix", "attention_explorer", ATTENTION, (
        Move("prefix", "before", "before (from a text)"),
        Move("layer", "right", "layer 3, head 3"),
        Move("head", "left", "layer 3, head 2"))),
    Widget("08_flavours", "phi_explorer", TRAINED, (
        Move("matrix", "layer 1", "layer 1, q_proj"),
        Move("compare", "the same, of ΔW", "the same, of ΔW"))),
    Widget("09_vram", "timeline_viewer", SIMULATED, (
        Move("configuration", "QLoRA", "of QLoRA, checkpointing, stacked"),)),
    Widget("09_vram", "explorer", "", (
        Move("model", "llama-3.2-3b", "llama-3.2-3b, qlora of rank 16"),
        Move("method", "lora", "3b, lora of rank 16"),
        Move("batch", "right", "8 rows of"),
        Move("tokens", "drag", "8192 tokens"),
        Move("rank", "right", "rank 32"),
        Move("checkpointing", "click", "with checkpointing"),
        Move("optimizer", "adamw_8bit", "tokens, adamw_8bit"),
        Move("attention", "eager", "eager attention"))),
    Widget("10_evaluate", "rows_explorer", "", (
        Move("first, %", "right", "Pass rates of 71 and 75 %"),
        Move("second, %", "80", "Pass rates of 71 and 80 %"),
        Move("test rows", "drag", "On 5000 rows"))),
    Widget("11_capstone", "pareto_explorer", TABLE, (
        Move("across", "tokens per second", "Scatter plot of tokens read in a second and held-out loss"),
        Move("upwards", "forgetting", "in a second and forgetting"))),
)


def code_of(chapter: str) -> list[str]:
    """The code cells of a built chapter."""
    notebook = nbformat.read(ROOT / "course" / chapter / f"{chapter[3:]}.ipynb", as_version=4)
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def called(source: str) -> set[str]:
    """Names of the functions that a cell calls."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a magic
        return set()
    functions = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {getattr(function, "attr", getattr(function, "id", "")) for function in functions}


def widget_functions() -> set[str]:
    """Functions of pefttools.widgets that show controls."""
    modules = [importlib.import_module(f"pefttools.widgets.{m.name}") for m in pkgutil.iter_modules(widgets.__path__)]
    return {name for module in modules for name, made in inspect.getmembers(module, inspect.isfunction)
            if made.__module__ == module.__name__ and name != "slider_figure" and "slider_figure" in called_in(made)}


def called_in(function) -> set[str]:
    return called(textwrap.dedent(inspect.getsource(function)))


def test_no_widget_is_left_out():
    """Of the chapters and of the page; and what stands above is in the chapters."""
    functions, shown = widget_functions(), set()
    for path in sorted(ROOT.glob("course/*/*.ipynb")):
        chapter = path.parent.name
        shown |= {(chapter, name) for source in code_of(chapter) for name in called(source) & functions}
    assert shown == {(widget.chapter, widget.name) for widget in WIDGETS}
    assert functions == {widget.name for widget in WIDGETS} | {"simulated"}  # of the page, below


@pytest.mark.parametrize("widget", WIDGETS, ids=str)
def test_a_widget_follows_its_controls(lab, widget):
    """No error, another picture and the right words after every move, and nothing in the browser's console."""
    cells = code_of(widget.chapter)
    header = [source for source in cells if "from pefttools.widgets" in source or source.startswith("import datasets")]
    (showing,) = [source for source in cells if widget.name in called(source)]
    lab.run(*header, *filter(None, [widget.before]), showing)
    seen = lab.picture()["alt"]
    for move in widget.moves:
        assert move.words not in seen, f"{move} would prove nothing: {seen}"
        seen = lab.move(move.label, move.how)["alt"]
        assert move.words in seen, f"{move}: {seen}"
    errors = lab.console_errors()
    assert not errors, "\n".join(errors)


def test_the_page_of_the_memory_widget(browser, page, serve, tmp_path):
    """`make vram-page`: Voila shows both widgets without code, and they move."""
    pytest.importorskip("voila", reason="there is no Voila: pip install voila")
    browser.get(serve(tmp_path, "-m", "pefttools.widgets.vram_page", "--no-browser"))
    for index, move in enumerate((Move("rank", "right", "llama-3.2-1b, qlora of rank 32"),
                                  Move("method", "full", "of llama-3.2-1b, full, stacked"))):
        assert move.words not in page.picture(index)["alt"]
        assert move.words in page.move(move.label, move.how, index)["alt"]
    # Voila's own: a font from the network, and JupyterLab's extensions of other packages, which find no JupyterLab
    known = ("fontawesome", "/labextensions/")
    assert not [error for error in page.console_errors() if not any(word in error for word in known)]
