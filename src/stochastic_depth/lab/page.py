"""Results of runs as one HTML page, which loads nothing from the network."""

import base64
import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from stochastic_depth.files import make_folders, write_whole
from stochastic_depth.lab.active_blocks_chart import active_blocks_figure, drop_rates_figure
from stochastic_depth.lab.bench.depth_chart import depth_cost
from stochastic_depth.lab.charts import Figure
from stochastic_depth.lab.drawing import NARROW, WIDE, file_png, file_svg, page_svg
from stochastic_depth.lab.ensemble_chart import ensemble_figure
from stochastic_depth.lab.gradients_chart import block_gradients, gradient_strength
from stochastic_depth.lab.outcomes import Experiment, describe, describe_data, experiments
from stochastic_depth.lab.pruning_chart import pruned_blocks
from stochastic_depth.lab.sources import (
    RecordedRun,
    RecordedSweep,
    Sources,
    read_sources,
    watched_files,
)
from stochastic_depth.lab.style import style_sheet
from stochastic_depth.lab.sweep.charts import depth_sweep, gates_figure, survival_sweep
from stochastic_depth.lab.sweep.gates import read_results
from stochastic_depth.lab.tables import Table, Tile, flat, overview, settings, tables, tiles
from stochastic_depth.lab.training_curves import training_curves, training_time

COMMANDS = {
    "block-gradients": ("Gradient strength over depth", "stochastic-depth train RECIPE"),
    "active-blocks": ("Active blocks in a step", "stochastic-depth train RECIPE"),
    "ensemble": ("The implicit ensemble", "stochastic-depth analyze ensemble RUN"),
    "pruned-blocks": ("Blocks pruned", "stochastic-depth analyze pruning RUN"),
    "survival-sweep": ("Error and time against p_L", "stochastic-depth sweep survival RECIPE"),
    "depth-sweep": ("Error over p_L and depth", "stochastic-depth sweep depth RECIPE"),
    "gates-sweep": ("Error and cost by way of gating", "stochastic-depth sweep gates RECIPE"),
    "depth-cost": ("Time and memory against depth", "stochastic-depth bench depth --out FILE"),
}
"""For figures that lack data: the title, and the command that measures the data."""


@dataclass(frozen=True)
class Section:
    """The part of a page about one experiment, sweep or benchmark."""

    title: str
    figures: tuple[Figure, ...]
    said: str = ""
    tiles: tuple[Tile, ...] = ()
    tables: tuple[Table, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()
    runs: Table | None = None
    code: str = ""
    """Python code for the reader to paste."""


@dataclass(frozen=True)
class Report:
    """All sections of a page."""

    sections: tuple[Section, ...]
    overview: Table | None
    """A table of all experiments, if there are several."""
    missing: tuple[tuple[str, str], ...]
    """The title of each figure that lacks data, and the command that measures the data."""


def report(sources: Sources) -> Report:
    """Everything that `sources` can show. Figures in different sections have different ids."""
    trained = experiments(sources.runs)
    begun = [run for run in sources.runs if not run.records]
    sections = [
        *map(_experiment, trained),
        *([_begun(begun)] if begun else []),
        *map(_sweep, sources.sweeps),
        *map(_benchmark, sources.benchmarks),
    ]
    drawn = {figure.id for section in sections for figure in section.figures}
    missing = tuple(command for id, command in COMMANDS.items() if id not in drawn)
    return Report(
        tuple(_with_distinct_ids(sections)),
        overview(trained) if len(trained) > 1 else None,
        missing,
    )


def _experiment(experiment: Experiment) -> Section:
    drawn: list[Figure | None] = [
        training_curves(experiment),
        training_time(experiment),
        drop_rates_figure(experiment),
        gradient_strength(experiment),
        block_gradients(experiment),
        *_of_each(experiment, active_blocks_figure),
        *_of_each(experiment, ensemble_figure),
        pruned_blocks(experiment),
    ]
    shared, runs = settings(list(experiment.runs))
    return Section(
        experiment.title,
        tuple(figure for figure in drawn if figure),
        tiles=tuple(tiles(experiment)),
        tables=tuple(tables(experiment)),
        settings=tuple(shared),
        runs=runs,
    )


def _begun(runs: list[RecordedRun]) -> Section:
    shared, table = settings(runs)
    said = "Nothing was measured yet."
    return Section("Runs that have begun", (), said, settings=tuple(shared), runs=table)


def _of_each(experiment: Experiment, draw: Callable[..., Figure | None]) -> Iterable[Figure | None]:
    """A figure for each kind of stochastic depth; the id of the first has no number."""
    drawn = [figure for series in experiment.stochastic if (figure := draw(series))]
    return [replace(f, id=f"{f.id}-{n}" if n > 1 else f.id) for n, f in enumerate(drawn, start=1)]


def _sweep(recorded: RecordedSweep) -> Section:
    sweep = recorded.sweep
    if sweep.kind == "gates":
        result = read_results(sweep.folder)
        drawn = gates_figure(result) if result else None
    else:
        drawn = (depth_sweep if sweep.kind == "depth" else survival_sweep)(recorded)
    finished = sum(run.finished for run in recorded.runs)
    failed = sum(run.failed for run in recorded.runs)
    said = f"{sweep.folder}: {finished} of {recorded.size} runs finished"
    said += f", {failed} failed." if failed else "."
    if not recorded.runs:
        return Section(f"Sweep {sweep.folder.name}", (), said)
    shared, runs = settings(recorded.runs)
    if sweep.kind == "depth":
        title = f"p_L against depth, {describe_data(sweep.config)}"
    elif sweep.kind == "gates":
        title = f"Ways of gating, {describe(sweep.config)}"
    else:
        title = f"p_L at one depth, {describe(sweep.config)}"
    return Section(title, (drawn,) if drawn else (), said, settings=tuple(shared), runs=runs)


def _benchmark(result: dict[str, Any]) -> Section:
    described = {k: result.get(k) for k in ("settings", "execution", "machine", "versions")}
    return Section("Cost of depth", (depth_cost(result),), settings=tuple(flat(described).items()))


def _with_distinct_ids(sections: list[Section]) -> Iterable[Section]:
    if len(sections) == 1:
        return sections
    taken: dict[str, int] = {}
    made = []
    for section in sections:
        slug = re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-")[:60]
        taken[slug] = taken.get(slug, 0) + 1
        prefix = slug if taken[slug] == 1 else f"{slug}-{taken[slug]}"
        figures = tuple(replace(f, id=f"{prefix}-{f.id}") for f in section.figures)
        made.append(replace(section, figures=figures))
    return made


@dataclass(frozen=True)
class Drawn:
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
    script = (folder / "report.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters["unbroken"] = lambda title: title.replace("-", "\N{NON-BREAKING HYPHEN}")
    return environment.from_string((folder / "report.html").read_text()).render(
        report=report,
        title=_page_title(report),
        state=f"{state} Written {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC.",
        refresh=refresh,
        draw=Drawn,
        version=version("stochastic-depth"),
        style=Markup(style_sheet() + (folder / "report.css").read_text()),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
    )


def _page_title(report: Report) -> str:
    titles = [section.title for section in report.sections]
    return titles[0] if len(titles) == 1 else "Constant and stochastic depth"


def _state(sources: Sources) -> str:
    runs = list(sources.all_runs())
    under_way = sum(not (run.finished or run.failed) for run in runs)
    count = f"{len(runs)} run{'s' * (len(runs) != 1)}"
    going = f", {under_way} not finished" if under_way else ""
    return f"{count}{going}."


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
    """Write the page, and again whenever a journal has changed, until every run is finished.

    `out` holds a complete page at any time; the page reloads itself.

    Args:
        every: seconds between looks at the journals.
    """
    sources, seen = read_sources(paths), None
    while True:
        # Looked up before reading, so that changes in the meantime are seen next time.
        now = _changes(sources, paths)
        if now == seen:
            time.sleep(every)
            continue
        sources, seen = read_sources(paths), now
        yield _write(sources, out, figures, REFRESH if sources.under_way else None)
        if not sources.under_way:
            return


def _write(sources: Sources, out: Path, figures: Path | None, refresh: int | None) -> Report:
    made = report(sources)
    make_folders(out.parent)
    write_whole(out, render(made, _state(sources), refresh).encode())
    if figures is not None:
        make_folders(figures)
        for section in made.sections:
            for figure in section.figures:
                write_whole(figures / f"{figure.id}.csv", figure.csv().encode())
                write_whole(figures / f"{figure.id}.svg", file_svg(figure.title, figure))
                write_whole(figures / f"{figure.id}.png", file_png(figure.title, figure))
    return made


def _changes(sources: Sources, paths: Sequence[Path]) -> list[tuple[int, int] | None]:
    """Size and time of every file that a report depends on and that may change."""
    found = []
    for path in watched_files(sources, paths):
        try:
            status = path.stat()
            found.append((status.st_size, status.st_mtime_ns))
        except OSError:
            found.append(None)
    return found
