"""One HTML file with everything in it, that asks nothing of any network."""

import base64
import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from stochastic_depth.report.drawing import NARROW, WIDE, page_svg
from stochastic_depth.report.figure import Figure
from stochastic_depth.report.sections import Report
from stochastic_depth.report.sources import Sources
from stochastic_depth.report.style import style_sheet


@dataclass(frozen=True)
class Drawn:
    """A figure in the two widths that a page chooses from, and its data as a link."""

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


def page(report: Report, sources: Sources, refresh: int | None = None) -> str:
    """The HTML of `report`.

    Whatever comes from a run is text: the template escapes it, Vega-Lite escapes it in drawings,
    and the page's own policy lets no script run but the one that is in it.

    Args:
        refresh: seconds after which the page loads itself anew (none: never).
    """
    folder = files("stochastic_depth.report") / "template"
    script = (folder / "report.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters["unbroken"] = lambda title: title.replace("-", "\N{NON-BREAKING HYPHEN}")
    return environment.from_string((folder / "report.html").read_text()).render(
        report=report,
        title=_title(report),
        state=_state(sources),
        refresh=refresh,
        draw=Drawn,
        version=version("stochastic-depth"),
        style=Markup(style_sheet() + (folder / "report.css").read_text()),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
    )


def _title(report: Report) -> str:
    titles = [section.title for section in report.sections]
    return titles[0] if len(titles) == 1 else "Constant and stochastic depth"


def _state(sources: Sources) -> str:
    runs = list(sources.all_runs())
    under_way = sum(not (run.finished or run.failed) for run in runs)
    count = f"{len(runs)} run{'s' * (len(runs) != 1)}"
    going = f", {under_way} not finished" if under_way else ""
    return f"{count}{going}. Written {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC."
