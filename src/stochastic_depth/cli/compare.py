"""stochastic-depth compare [RECIPE] [OPTIONS]."""

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from stochastic_depth.cli.console import PlainConsole
from stochastic_depth.cli.recipe import parse
from stochastic_depth.cli.train import stopped
from stochastic_depth.files import write_whole
from stochastic_depth.lab.comparison import compare, comparison_table, train_pairs, write_comparison
from stochastic_depth.lab.drawing import file_png
from stochastic_depth.lab.pace import START_AND_END, epochs_of, measure_pace
from stochastic_depth.lab.sources import read_run
from stochastic_depth.lab.study import experiments
from stochastic_depth.lab.training import training_curves, training_time
from stochastic_depth.train import Config, Interrupted, Run
from stochastic_depth.train.display import Display
from stochastic_depth.train.fit import StopSignals

TEXT = """Train a recipe and its constant-depth twin, taking turns by the epoch; show both
as a table and a picture: errors, seconds, the saving measured and expected.

Started again it goes on where it stopped, and trains nothing twice.
"""


@dataclass(frozen=True)
class Compare:
    config: Annotated[Config, tyro.conf.arg(name="")]
    seeds: int = 3
    """How many seeds, from `seed` on."""
    minutes: float | None = None
    """About how long it may take: where the machine is slow, with fewer seeds or epochs."""
    out: Path | None = None
    """Folder for the runs, the table, the picture and the JSON (none: runs/compare-RECIPE)."""
    quiet: bool = False
    """Print only the table."""


def main(arguments: list[str]) -> int:
    asked = parse("compare", TEXT, arguments, Compare)
    config = asked.config
    folder = asked.out or Path("runs") / f"compare-{config.recipe}"
    seeds = range(config.seed, config.seed + asked.seeds)
    console = PlainConsole()
    end = None if asked.minutes is None else time.monotonic() + 60 * asked.minutes - START_AND_END
    if end is not None:
        config = _fitted(config, seeds, folder, end, console)
    with StopSignals() as stop, Display(console, asked.quiet) as display:
        try:
            runs = train_pairs(config, seeds, folder, display, stop, end)
        except Interrupted as interrupted:
            return stopped(console, interrupted, shlex.join(["compare", *arguments]))
    comparison = compare(runs)
    title = f"{config.data.name}, {config.model.kind} {config.model.depth}, {config.epochs} epochs"
    write_comparison(folder / "comparison.json", comparison, runs)
    write_whole(folder / "comparison.png", _picture(title, runs))
    console.print(comparison_table(title, comparison, len(runs["constant"])))
    if len(runs["constant"]) < len(seeds):
        console.print(
            f"{len(runs['constant'])} of {len(seeds)} seeds, to end in {asked.minutes:g} minutes: "
            "the same command again goes on with the next",
            highlight=False,
        )
    for name in ("comparison.png", "comparison.json"):
        console.print(str(folder / name), soft_wrap=True)
    return 0


def _fitted(
    config: Config, seeds: Sequence[int], folder: Path, end: float, console: PlainConsole
) -> Config:
    """`config` with as many epochs as fit until `end`; says what was measured and decided."""
    console.print("measuring how long a training step takes here", highlight=False)
    pace = measure_pace(config)
    console.print(pace.described(), highlight=False)
    epochs = epochs_of(folder, config, seeds)
    if epochs is None:
        epochs = pace.epochs_in(end - time.monotonic(), config.epochs)
    if epochs < config.epochs:
        console.print(
            f"training for {epochs} of {config.epochs} epochs, to end in time: without --minutes, "
            "and with another --out, it trains for all of them",
            highlight=False,
        )
    return replace(config, epochs=epochs)


def _picture(title: str, runs: dict[str, list[Run]]) -> bytes:
    """Training loss, test error and the seconds of an epoch, as PNG."""
    trained = [read_run(run.path) for of_kind in runs.values() for run in of_kind]
    (experiment,) = experiments(trained)
    return file_png(title, training_curves(experiment), training_time(experiment))
