"""A figure: what it shows in words, its data, and its drawing."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

Row = Mapping[str, Any]
"""One observation: texts and numbers, None where there is none."""
Panel = alt.Chart | alt.LayerChart


@dataclass(frozen=True)
class Key:
    """A line of a legend."""

    name: str
    colour: str
    dash: tuple[int, int] = (1, 0)
    """Pixels of stroke and of space."""


@dataclass(frozen=True)
class Figure:
    """Drawn from its rows alone, so that whoever has them can check it."""

    id: str
    """A file name: lower-case letters, digits and hyphens."""
    title: str
    sentence: str
    """What it shows, in the numbers of this very data."""
    rows: Sequence[Row]
    panels: Sequence[Panel]
    """Drawn side by side where there is room, else one below the other."""
    legend: Sequence[Key] = ()
    note: str = ""
    """How it was measured, and what is averaged."""
    height: int = 240
    """Of the plot in each panel, pixels."""
    axis: int = 58
    """What stands to the left of the plot in each panel, pixels."""

    def csv(self) -> str:
        """The rows, a column for each of their keys."""
        text = io.StringIO()
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in self.rows)
        return text.getvalue()


def _cell(value: Any) -> Any:
    """A text that begins like a formula, with the apostrophe that keeps spreadsheets calm."""
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t\r" else value
