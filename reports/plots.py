"""Figures for plotly.js, written as JSON. Colours are names of the page's CSS variables; plot.js looks them up."""

from __future__ import annotations

import html
from collections.abc import Sequence

from reports.markup import Html, data_script, join, tag

MARK = 'class="plot"'
"""Is in the page exactly when plotly.js is needed."""


def plot(*, label: str, traces: Sequence[dict[str, object]], layout: dict[str, object], height: int) -> Html:
    """Place a chart of `height` pixels; `label` is what a screen reader says. It draws itself when scripts run."""
    return join(
        tag("div", cls="plot", role="img", aria_label=label, style=f"height:{height}px"),
        data_script({"data": traces, "layout": layout}, cls="plot-data"),
        tag("noscript", tag("p", "This chart needs JavaScript; its numbers are in the table below.", cls="note")),
    )


def label(text: str) -> str:
    """Escape a label: plotly.js reads some HTML in labels."""
    return html.escape(text)


def line(name: str, x: Sequence[float], y: Sequence[float], colour: str, **more: object) -> dict[str, object]:
    """One line; `colour` is a CSS variable such as `--measured`."""
    style: dict[str, object] = {"color": colour, "width": 1.75}
    return {"type": "scatter", "mode": "lines", "name": label(name), "x": x, "y": y, "line": style, **more}
