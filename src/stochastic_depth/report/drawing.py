"""Figures as SVG and PNG, by Vega-Lite and without a browser."""

import copy
from typing import Any

import altair as alt
import vl_convert

from stochastic_depth.report.figure import Figure
from stochastic_depth.report.style import CONFIG, LIGHT, style_sheet

WIDE, NARROW = 720, 350
"""Widths of a figure: of a page, and of a phone. Pixels."""
GAP = 28
"""Between two panels."""


def page_svg(figure: Figure, width: int) -> str:
    """For a page that has the style sheet: without title and legend, WIDE or NARROW.

    The text of every mark is its `aria-label`.
    """
    return vl_convert.vegalite_to_svg(_specification(figure, width, alone=False))


def file_svg(figure: Figure) -> bytes:
    """A file of its own, that follows the theme of whoever shows it."""
    drawn = vl_convert.vegalite_to_svg(_specification(figure, WIDE, alone=True))
    head, rest = drawn.split(">", 1)
    style = f"<style>{style_sheet()}</style>"
    return f"{head}>{style}{rest}\n".encode()


def file_png(figure: Figure) -> bytes:
    """On white, at twice the resolution of a screen."""
    return vl_convert.vegalite_to_png(_specification(figure, WIDE, alone=True), scale=2)


def _specification(figure: Figure, width: int, alone: bool) -> dict[str, Any]:
    columns = len(figure.panels) if width == WIDE else 1
    inner = (width - GAP * (columns - 1)) // columns - figure.axis
    panels = [panel.properties(width=inner, height=figure.height) for panel in figure.panels]
    chart = alt.concat(*panels, columns=columns).resolve_scale(color="shared", strokeDash="shared")
    config = copy.deepcopy(CONFIG)
    if alone:
        chart = chart.properties(title=alt.Title(figure.title, fontSize=16, offset=16))
        config["background"] = LIGHT["paper"]
    else:
        config["legend"]["disable"] = True
    return {**chart.to_dict(), "config": config, "padding": 4}
