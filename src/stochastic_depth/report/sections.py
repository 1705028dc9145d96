"""A report in parts: one for each experiment, sweep and benchmark."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from stochastic_depth.report import figures
from stochastic_depth.report.experiment import Experiment, describe, describe_data, experiments
from stochastic_depth.report.figure import Figure
from stochastic_depth.report.headline import Tile, overview, tiles
from stochastic_depth.report.settings import flat, settings
from stochastic_depth.report.sources import Sources, Sweep, Trained
from stochastic_depth.report.tables import Table, tables

COMMANDS = {
    "block-gradients": ("Gradient strength over depth", "stochastic-depth train RECIPE"),
    "active-blocks": ("Active blocks in a step", "stochastic-depth train RECIPE"),
    "ensemble": ("The implicit ensemble", "stochastic-depth analyze ensemble RUN"),
    "removed-blocks": ("Blocks thrown away", "stochastic-depth analyze depth RUN"),
    "survival-sweep": ("Error and time against p_L", "stochastic-depth sweep survival RECIPE"),
    "depth-sweep": ("Error over p_L and depth", "stochastic-depth sweep depth RECIPE"),
    "depth-cost": ("Time and memory against depth", "stochastic-depth bench depth --out FILE"),
}
"""What brings the data of a figure that is not there."""


@dataclass(frozen=True)
class Section:
    """What belongs to one experiment, sweep or benchmark."""

    title: str
    figures: tuple[Figure, ...]
    said: str = ""
    tiles: tuple[Tile, ...] = ()
    tables: tuple[Table, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()
    runs: Table | None = None


@dataclass(frozen=True)
class Report:
    """Everything that is shown."""

    sections: tuple[Section, ...]
    overview: Table | None
    """Of several experiments."""
    missing: tuple[tuple[str, str], ...]
    """Title of a figure that is not there, and the command that brings its data."""


def report(sources: Sources) -> Report:
    """All that `sources` can show. Figures of several sections have different ids."""
    trained = experiments(sources.runs)
    begun = [run for run in sources.runs if not run.records]
    sections = [
        *map(_experiment, trained),
        *([_begun(begun)] if begun else []),
        *map(_sweep, sources.sweeps),
        *map(_benchmark, sources.benchmarks),
    ]
    drawn = {figure.id for section in sections for figure in section.figures}
    missing = tuple(told for id, told in COMMANDS.items() if id not in drawn)
    return Report(
        tuple(_told_apart(sections)), overview(trained) if len(trained) > 1 else None, missing
    )


def _experiment(experiment: Experiment) -> Section:
    drawn: list[Figure | None] = [
        figures.training_curves(experiment),
        figures.training_time(experiment),
        figures.gradient_strength(experiment),
        figures.block_gradients(experiment),
        *_of_each(experiment, figures.active_blocks),
        *_of_each(experiment, figures.ensemble),
        figures.removed_blocks(experiment),
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


def _begun(runs: list[Trained]) -> Section:
    shared, table = settings(runs)
    said = "Nothing was measured yet."
    return Section("Runs that have begun", (), said, settings=tuple(shared), runs=table)


def _of_each(experiment: Experiment, draw: Callable[..., Figure | None]) -> Iterable[Figure | None]:
    """A figure for each kind of stochastic depth; the first has no number."""
    drawn = [figure for series in experiment.stochastic if (figure := draw(series))]
    return [replace(f, id=f"{f.id}-{n}" if n > 1 else f.id) for n, f in enumerate(drawn, start=1)]


def _sweep(sweep: Sweep) -> Section:
    drawn = (figures.depth_sweep if sweep.kind == "depth" else figures.survival_sweep)(sweep)
    finished = sum(run.finished for run in sweep.runs)
    failed = sum(run.failed for run in sweep.runs)
    said = f"{sweep.path}: {finished} of {sweep.size} runs finished"
    said += f", {failed} failed." if failed else "."
    if not sweep.runs:
        return Section(f"Sweep {sweep.path.name}", (), said)
    shared, runs = settings(sweep.runs)
    config = sweep.runs[0].run.config
    if sweep.kind == "depth":
        title = f"p_L against depth, {describe_data(config)}"
    else:
        title = f"p_L at one depth, {describe(config)}"
    return Section(title, (drawn,) if drawn else (), said, settings=tuple(shared), runs=runs)


def _benchmark(result: dict[str, Any]) -> Section:
    described = {k: result.get(k) for k in ("settings", "execution", "machine", "versions")}
    return Section(
        "Cost of depth", (figures.depth_cost(result),), settings=tuple(flat(described).items())
    )


def _told_apart(sections: list[Section]) -> Iterable[Section]:
    if len(sections) == 1:
        return sections
    taken: dict[str, int] = {}
    made = []
    for section in sections:
        slug = re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-")[:60]
        taken[slug] = taken.get(slug, 0) + 1
        prefix = slug if taken[slug] == 1 else f"{slug}-{taken[slug]}"
        told = tuple(replace(f, id=f"{prefix}-{f.id}") for f in section.figures)
        made.append(replace(section, figures=told))
    return made
