"""Figures with their alt text, sliders with their static first frame: without a front end."""

from __future__ import annotations

import base64
import builtins
import sys

import matplotlib
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from pefttools.widgets import Slider, base, show, slider_figure

PNG = b"\x89PNG\r\n\x1a\n"


def draw(r=1, alpha=2.0, name="q", grid=False):
    fig, ax = plt.subplots(figsize=(2, 1.5))
    ax.bar(range(r), [alpha] * r)
    ax.set_title(name)
    return fig


@pytest.fixture
def shown(monkeypatch):
    """What would be displayed in a notebook."""
    import IPython.display

    outputs = []
    monkeypatch.setattr(base, "in_notebook", lambda: True)
    monkeypatch.setattr(
        IPython.display, "display", lambda data, raw=False, metadata=None: outputs.append((data, metadata))
    )
    return outputs


def test_a_figure_is_a_png_with_its_alt_text_and_closed(shown):
    fig = draw()
    show(fig, alt='Bars: 3 < 5 and "quotes"')
    ((data, metadata),) = shown
    assert base64.b64decode(data["image/png"]).startswith(PNG)
    assert 'alt="Bars: 3 &lt; 5 and &quot;quotes&quot;"' in data["text/html"] and data["image/png"] in data["text/html"]
    assert data["text/plain"] == '[figure] Bars: 3 < 5 and "quotes"' and metadata["image/png"]["alt"].startswith("Bars")
    assert not plt.fignum_exists(fig.number)


def test_a_figure_made_without_pyplot(shown):
    fig = Figure(figsize=(2, 1))
    fig.subplots().plot([1, 2])
    show(fig, "A rising line.")
    assert base64.b64decode(shown[0][0]["image/png"]).startswith(PNG)


@pytest.mark.parametrize("alt", ["", "  \n", None])
def test_an_alt_text_is_required(alt):
    fig = draw()
    with pytest.raises(ValueError, match="alt"):
        show(fig, alt)
    plt.close(fig)


def test_axes_are_no_figure():
    fig = draw()
    with pytest.raises(TypeError, match="ax.figure"):
        show(fig.axes[0], "Axes.")
    plt.close(fig)


def test_outside_a_notebook_the_alt_text_is_printed(capsys):
    show(draw(), "Three bars.")
    assert capsys.readouterr().out == "[figure] Three bars.\n"


def test_sliders_have_a_first_frame_and_follow_their_values(shown):
    calls = []

    def recording(**values):
        calls.append(values)
        return draw(**values)

    figure = slider_figure(
        recording,
        alt=lambda r, **rest: f"{r} bars.",
        title="Bars <b>",
        r=Slider(3, 1, 8, label="rank r"),
        alpha=(0.5, 4.0, 1.0),
        name=["q", "v"],
        grid=False,
    )
    assert calls == [{"r": 3, "alpha": 1.0, "name": "q", "grid": False}]
    ((data, _),) = shown
    assert (
        "application/vnd.jupyter.widget-view+json" in data
        and 'alt="3 bars."' in data["text/html"]
        and "image/png" in data
    )
    panel = figure.controls()
    heading, r, alpha, name, grid, picture = panel.children
    assert "Bars &lt;b&gt;" in heading.value
    assert [type(control).__name__ for control in (r, alpha, name, grid)] == [
        "IntSlider",
        "FloatSlider",
        "Dropdown",
        "Checkbox",
    ]
    assert (r.description, r.min, r.max, r.continuous_update) == ("rank r", 1, 8, False)
    r.value = 5
    assert calls[-1]["r"] == 5 and 'alt="5 bars."' in picture.value
    name.value, grid.value = "v", True
    assert calls[-1] == {"r": 5, "alpha": 1.0, "name": "v", "grid": True}
    assert plt.get_fignums() == []


def test_numbers_to_choose_from_make_a_slider_over_them(shown):
    figure = slider_figure(draw, alt="Bars.", r=[8, 1, 2, 64])
    control = figure.controls().children[0]
    assert type(control).__name__ == "SelectionSlider" and control.value == 8 and control.options == (1, 2, 8, 64)


def test_only_core_widgets_are_used(shown):
    figure = slider_figure(draw, alt="Bars.", r=[1, 2], name=["q", "v"], grid=True, alpha=Slider(1.0, 0.0, 2.0))
    stack, modules = [figure.controls()], set()
    while stack:
        widget = stack.pop()
        modules.add(widget._model_module)
        assert type(widget).__name__ not in ("Accordion", "Output")
        stack.extend(getattr(widget, "children", ()))
    assert modules == {"@jupyter-widgets/controls"}


def test_an_error_while_drawing_is_shown_and_not_lost(shown):
    def fragile(r):
        if r == 2:
            raise ValueError("no <two>")
        return draw(r)

    panel = slider_figure(fragile, alt="Bars.", r=[1, 2, 3]).controls()
    control, picture = panel.children
    control.value = 2
    assert "ValueError: no &lt;two&gt;" in picture.value
    control.value = 3
    assert "<img" in picture.value


def test_without_ipywidgets_the_first_frame_is_shown(shown, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.partition(".")[0] == "ipywidgets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    figure = slider_figure(draw, alt="Bars.", r=Slider(3, 1, 8))
    assert set(shown[0][0]) == {"text/html", "image/png", "text/plain"}
    assert figure.controls() is None


def test_frames_without_a_front_end(capsys):
    figure = slider_figure(draw, alt=lambda r: f"{r} bars.", r=Slider(3, 1, 8))
    assert capsys.readouterr().out == "[figure] 3 bars.\n"
    assert figure.frame(r=7)["text/plain"] == "[figure] 7 bars."
    with pytest.raises(TypeError, match="no slider 'rank'"):
        figure.frame(rank=3)


@pytest.mark.parametrize("bad", [(1, 2), [], "q", 3, None])
def test_sliders_of_no_known_form(bad):
    with pytest.raises(TypeError, match="it must be a Slider"):
        slider_figure(draw, alt="Bars.", r=bad)


def test_a_slider_starts_between_its_ends():
    with pytest.raises(ValueError, match="between"):
        Slider(9, 1, 8)


def test_importing_the_module_imports_neither_matplotlib_nor_ipywidgets():
    import subprocess

    heavy = ("matplotlib", "ipywidgets", "torch", "IPython")
    code = f"import sys, pefttools.widgets.base; print(any(name in sys.modules for name in {heavy}))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout.strip()
        == "False"
    )
