"""A report as one HTML page, which loads nothing from the network, and its files."""

import base64
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from stochastic_depth.files import make_folders, write_output, write_whole
from stochastic_depth.lab.charts import Figure
from stochastic_depth.lab.drawing import NARROW, WIDE, file_png, file_svg, page_svg
from stochastic_depth.lab.recorded import Sources, read_sources, state_of
from stochastic_depth.lab.report import Report, build_report
from stochastic_depth.lab.style import style_sheet
from stochastic_depth.plain_text import count_text


@dataclass(frozen=True)
class DrawnFigure:
    """A figure in the two widths between which a page chooses, and its data as a link."""

    figure: Figure

    @property
    def id(self) -> str:
        return self.figure.id

    @property
    def wide(self) -> Markup:
        return Markup(page_svg(self.figure, WIDE))

    @property
    def narrow(self) -> Markup:
        return Markup(page_svg(self.figure, NARROW))

    @property
    def data(self) -> str:
        content = base64.b64encode(self.figure.csv().encode()).decode()
        return f"data:text/csv;charset=utf-8;base64,{content}"


def render(report: Report, state: str, refresh: int | None = None) -> str:
    """The HTML of `report`.

    Everything that comes from a run is text: the template escapes it, Vega-Lite escapes it in
    drawings, and the security policy of the page allows only its own one script.

    Args:
        state: a sentence about the data that was read.
        refresh: after how many seconds the page reloads itself; never when None.
    """
    folder = files("stochastic_depth.lab") / "template"
    script = (folder / "report.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters["unbroken"] = lambda title: title.replace("-", "\N{NON-BREAKING HYPHEN}")
    return environment.from_string((folder / "report.html").read_text("utf-8")).render(
        report=report,
        title=_page_title(report),
        state=f"{state} Written {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC.",
        refresh=refresh,
        draw=DrawnFigure,
        version=version("stochastic-depth"),
        style=Markup(style_sheet() + (folder / "report.css").read_text("utf-8")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
    )


def _page_title(report: Report) -> str:
    titles = [section.title for section in report.sections]
    return titles[0] if len(titles) == 1 else "Constant and stochastic depth"


def _state(sources: Sources) -> str:
    runs = list(sources.all_runs())
    counts = {
        "not finished": sum(not run.ended for run in runs),
        "failed": sum(run.failed for run in runs),
    }
    parts = [f"{count} {what}" for what, count in counts.items() if count]
    return f"{', '.join([count_text(len(runs), 'run'), *parts])}."


REFRESH = 10
"""After how many seconds a watched page reloads itself."""


def write_report(paths: Sequence[Path], out: Path, figures: Path | None = None) -> Report:
    """Write a page about `paths` to `out`, and every figure to the folder `figures`.

    Figures are written as PNG and SVG, with their data as CSV.

    Raises:
        RunError: when one of the paths cannot be understood, or a file cannot be written.
    """
    return _write(read_sources(paths), out, figures, None)


def watch_report(
    paths: Sequence[Path], out: Path, figures: Path | None = None, every: float = 2.0
) -> Iterator[Report]:
    """Write the page, and again whenever a file of a run has changed, until every run is finished.

    `out` holds a complete page at any time; the page reloads itself.

    Args:
        every: seconds between looks at the files.
    """
    seen = None
    while True:
        # Looked up before reading, so that changes in the meantime are seen next time.
        now = state_of(paths)
        if now != seen:
            sources, seen = read_sources(paths), now
            yield _write(sources, out, figures, REFRESH if sources.under_way else None)
            if not sources.under_way:
                return
        time.sleep(every)


def _write(sources: Sources, out: Path, figures: Path | None, refresh: int | None) -> Report:
    made = build_report(sources)
    write_output(out, render(made, _state(sources), refresh).encode())
    if figures is not None:
        make_folders(figures)
        for section in made.sections:
            for figure in section.figures:
                write_whole(figures / f"{figure.id}.csv", figure.csv().encode())
                write_whole(figures / f"{figure.id}.svg", file_svg(figure.title, figure))
                write_whole(figures / f"{figure.id}.png", file_png(figure.title, figure))
    return made
