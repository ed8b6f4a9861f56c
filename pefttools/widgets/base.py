"""Showing figures: with a text for those who do not see them, and with sliders where a front end can move them.

    show(spectrum_figure(W), alt="Singular values of W: the first 8 carry 95 % of the energy.")
    slider_figure(draw, alt="…", rank=Slider(8, 1, 64), alpha=Slider(16, 1, 128))

`draw(**values)` is a pure function that returns a Matplotlib figure. The first frame is drawn at once, without a front
end; where ipywidgets and a front end are there, controls follow. Only core widgets are used: they work in Colab and VS
Code.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pefttools.grading.room import in_notebook

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 110


def show(fig: Figure, alt: str, dpi: int = DPI) -> None:
    """Show a figure as a PNG with an alt text, and close it.

    Args:
        fig: a Matplotlib figure.
        alt: what is to be seen, in a sentence or two; read out by screen readers, shown where the picture is not.

    Raises:
        ValueError: if `alt` is empty. TypeError: if `fig` is no figure.
    """
    _display(render(fig, alt, dpi), alt)


def render(fig: Figure, alt: str, dpi: int = DPI) -> dict[str, str]:
    """The figure as a Jupyter MIME bundle: text/html with the alt text, image/png, text/plain. Closes it."""
    if not isinstance(alt, str) or not alt.strip():
        raise ValueError(f"alt is {alt!r}: say in a sentence what the figure shows, for readers who do not see it")
    if not callable(getattr(fig, "savefig", None)):
        raise TypeError(f"fig is {type(fig).__name__}: give a Matplotlib figure (for axes: ax.figure)")
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight")
    _close(fig)
    png = base64.b64encode(buffer.getvalue()).decode("ascii")
    alt = " ".join(alt.split())
    return {"text/html": image_tag(png, alt), "image/png": png, "text/plain": f"[figure] {alt}"}


def image_tag(png: str, alt: str) -> str:
    """An <img> that holds its picture (base64 PNG) and its alt text, on white: axes are black in dark themes too."""
    return (
        f'<img alt="{html.escape(alt, quote=True)}" src="data:image/png;base64,{png}" '
        'style="max-width:100%;height:auto;background:white">'
    )


def _close(fig: Figure) -> None:
    import matplotlib.pyplot as plt

    plt.close(fig)  # else the inline backend shows it a second time, without its alt text


def _display(bundle: dict, alt: str) -> None:
    if not in_notebook():
        print(f"[figure] {alt}")
        return
    from IPython.display import display

    display(bundle, raw=True, metadata={"image/png": {"alt": alt}})


@dataclass(frozen=True)
class Slider:
    """A number to move: where it starts, its ends, its step (1 between whole numbers, else a hundredth of the way)."""

    value: float
    low: float
    high: float
    step: float | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high or self.low == self.high:
            raise ValueError(
                f"Slider: value {self.value} must lie between low {self.low} and high {self.high}, which must differ"
            )

    @property
    def whole(self) -> bool:
        """Whether it moves through whole numbers."""
        return all(type(number) is int for number in (self.value, self.low, self.high, self.step or 1))


class SliderFigure:
    """A figure with controls. `frame(**values)` is one picture of it as a MIME bundle, and needs no front end."""

    def __init__(
        self, draw: Callable[..., Figure], alt: str | Callable[..., str], title: str, sliders: dict[str, Any]
    ) -> None:
        self.draw, self.alt, self.title = draw, alt, title
        self.sliders = {name: _slider(name, given) for name, given in sliders.items()}
        self.start = {
            name: slider.value if isinstance(slider, Slider) else slider[0] for name, slider in self.sliders.items()
        }

    def alt_text(self, **values: Any) -> str:
        """The alt text for these values, the starting ones where none are given."""
        values = {**self.start, **values}
        return self.alt(**values) if callable(self.alt) else self.alt

    def frame(self, **values: Any) -> dict[str, str]:
        """Draw for these values, the starting ones where none are given."""
        unknown = set(values) - set(self.start)
        if unknown:
            raise TypeError(f"there is no slider {sorted(unknown)[0]!r}; there are {', '.join(self.start)}")
        values = {**self.start, **values}
        return render(self.draw(**values), self.alt_text(**values))

    def controls(self, first: dict[str, str] | None = None) -> Any:
        """The figure under its controls as a widget; None where ipywidgets is not installed."""
        try:
            import ipywidgets
        except ImportError:
            return None
        first = first or self.frame()
        picture = ipywidgets.HTML(value=first["text/html"])
        inputs = {name: _control(ipywidgets, name, slider) for name, slider in self.sliders.items()}

        def redraw(change: dict) -> None:
            try:
                picture.value = self.frame(**{name: control.value for name, control in inputs.items()})["text/html"]
            except Exception as error:  # in a callback it would be lost, and the picture silently wrong
                picture.value = f"<pre>{html.escape(f'{type(error).__name__}: {error}')}</pre>"

        for control in inputs.values():
            control.observe(redraw, "value")
        heading = [ipywidgets.HTML(value=f"<strong>{html.escape(self.title)}</strong>")] if self.title else []
        return ipywidgets.VBox([*heading, *inputs.values(), picture])

    def show(self) -> None:
        """Show it: controls where a front end can move them, else the first frame."""
        bundle = self.frame()
        panel = self.controls(bundle) if in_notebook() else None
        if panel is not None:
            # One output with both: front ends that know widgets show the controls, all others the first frame.
            bundle = {**widget_bundle(panel), **bundle}
        _display(bundle, self.alt_text())


def widget_bundle(widget: Any) -> dict[str, Any]:
    """A widget as a MIME bundle. ipywidgets 8 makes it; 7 (Colab has 7.7.1) only displays, so there it is made here."""
    make = getattr(widget, "_repr_mimebundle_", None)
    if make is not None:
        return dict(make())
    view = {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}
    return {"application/vnd.jupyter.widget-view+json": view, "text/plain": repr(widget)}


def slider_figure(
    draw: Callable[..., Figure], alt: str | Callable[..., str], title: str = "", **sliders: Any
) -> SliderFigure:
    """Show `draw(**values)` with a control for every value; returns the `SliderFigure`: tests call its `.frame(…)`.

    Args:
        draw: pure function of the values, returns a Matplotlib figure.
        alt: alt text, or a function of the values that gives it.
        title: a line above the controls.
        sliders: `Slider(start, low, high, step, label)` or (low, high, start); a list of choices, the first is the
            start (numbers make a slider over just these, texts a drop-down); True or False for a check box.
    """
    figure = SliderFigure(draw, alt, title, sliders)
    figure.show()
    return figure


def _slider(name: str, given: Any) -> Any:
    if isinstance(given, Slider):
        return given
    if isinstance(given, bool):
        return (given, not given)
    if isinstance(given, tuple) and len(given) == 3 and all(type(number) in (int, float) for number in given):
        low, high, start = given
        return Slider(start, low, high)
    if isinstance(given, list) and given:
        return given
    raise TypeError(
        f"{name} is {given!r}; it must be a Slider, (low, high, start), a list of choices, or True or False"
    )


WIDE = {"width": "min(100%, 500px)"}   # a slider's own 300 pixels leave no track beside a long label


def _control(ipywidgets: Any, name: str, slider: Any) -> Any:
    style = {"description_width": "initial"}
    if isinstance(slider, Slider):
        label = slider.label or name.replace("_", " ")
        kind = ipywidgets.IntSlider if slider.whole else ipywidgets.FloatSlider
        step = slider.step or (1 if slider.whole else (slider.high - slider.low) / 100)
        return kind(
            value=slider.value,
            min=slider.low,
            max=slider.high,
            step=step,
            description=label,
            continuous_update=False,
            style=style,
            layout=WIDE,
        )
    label = name.replace("_", " ")
    if isinstance(slider, tuple):
        return ipywidgets.Checkbox(value=slider[0], description=label, indent=False)
    if all(type(choice) in (int, float) for choice in slider):
        return ipywidgets.SelectionSlider(
            options=sorted(slider), value=slider[0], description=label, continuous_update=False, style=style,
            layout=WIDE,
        )
    return ipywidgets.Dropdown(options=slider, value=slider[0], description=label, style=style)
