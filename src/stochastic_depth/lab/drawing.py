"""Draw figures as SVG and PNG, with Vega-Lite and without a browser."""

import textwrap
from collections.abc import Sequence
from typing import Any

import altair as alt
import vl_convert

from stochastic_depth.lab.charts import Figure
from stochastic_depth.lab.style import CONFIG, LIGHT, style_sheet

WIDE, NARROW = 720, 350
"""The width of a figure on a page and on a phone, in pixels."""
GAP, BELOW = 28, 84
"""The space between two panels side by side, and between the plots of two panels one below the
other, in pixels."""


def page_svg(figure: Figure, width: int) -> str:
    """A figure for a page that has the style sheet: without title and legend, WIDE or NARROW.

    The text of every mark is its `aria-label`.
    """
    return vl_convert.vegalite_to_svg({**_without_legends(_row(figure, width)), "config": CONFIG})


def file_svg(title: str, *figures: Figure) -> bytes:
    """Figures below each other in one SVG file, which follows its viewer's light or dark theme."""
    drawn = vl_convert.vegalite_to_svg(_picture(title, figures))
    head, rest = drawn.split(">", 1)
    return f"{head}><style>{style_sheet()}</style>{rest}\n".encode()


def file_png(title: str, *figures: Figure) -> bytes:
    """Figures below each other as PNG on white, at twice the resolution of a screen."""
    return vl_convert.vegalite_to_png(_picture(title, figures), scale=2)


def _picture(title: str, figures: Sequence[Figure]) -> dict[str, Any]:
    rows = [_row(figure, WIDE) for figure in figures]
    if len(rows) > 1:
        for row, figure in zip(rows, figures, strict=True):
            row["title"] = _title(figure.title, figure.sentence, 14)
        data = {k: v for row in rows for k, v in row.pop("datasets", {}).items()}
        content = {"vconcat": rows, "datasets": data, "title": _title(title, "", 17)}
    else:
        content = {**rows[0], "title": _title(title, figures[0].sentence, 17)}
    config = {**CONFIG, "background": LIGHT["paper"]}
    return {**content, "config": config, "padding": 16}


def _title(title: str, sentence: str, size: int) -> dict[str, Any]:
    return {
        "text": title,
        "subtitle": textwrap.wrap(sentence, 110),
        "fontSize": size,
        "frame": "bounds",
        "offset": 18,
    }


def _row(figure: Figure, width: int) -> dict[str, Any]:
    """The panels side by side, or on a narrow page one below the other."""
    columns = 1 if width == NARROW else len(figure.panels)
    inner = (width - GAP * (columns - 1)) // columns - figure.axis
    panels = [panel.properties(width=inner, height=figure.height) for panel in figure.panels]
    spacing = alt.RowColnumber(column=figure.axis + GAP, row=BELOW)
    chart = alt.concat(*panels, columns=columns, bounds="flush", spacing=spacing)
    return chart.resolve_scale(color="shared", strokeDash="shared").to_dict()


def _without_legends(specification: Any) -> Any:
    if isinstance(specification, list):
        return [_without_legends(item) for item in specification]
    if isinstance(specification, dict):
        return {
            key: None if key == "legend" else _without_legends(value)
            for key, value in specification.items()
        }
    return specification
