"""Figures first, sliders second: what a picture needs to be seen by everybody."""

from __future__ import annotations

from pefttools.widgets.base import Slider, show, slider_figure

__all__ = ["Slider", "show", "slider_figure"]
