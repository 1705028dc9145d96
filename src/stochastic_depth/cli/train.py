"""stochastic-depth train, compare and eval, and the list of recipes."""

import json
import math
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from stochastic_depth.choices import CheckpointName
from stochastic_depth.cli.arguments import (
    Flag,
    choose,
    parse,
    parse_recipe,
    refuse,
    refuse_without_effect,
    require_run,
)
from stochastic_depth.errors import ConfigError, Interrupted, RunError
from stochastic_depth.extras import require_report
from stochastic_depth.plain_text import command, epoch_text
from stochastic_depth.recipes import RECIPES, describe_recipe
from stochastic_depth.train.checks import at_least
from stochastic_depth.train.config import Config

if TYPE_CHECKING:
    from rich.table import Table

    from stochastic_depth.cli.console import PlainConsole
    from stochastic_depth.data import Batches
    from stochastic_depth.train import Run

Folder = Annotated[Path | None, tyro.conf.arg(metavar="DIR")]

TRAIN_ABOUT = """Train one network; everything is written to one run folder.

Resume a run: stochastic-depth train --resume RUN [--data DIR] [--device STR]

By N processes: torchrun --nproc-per-node N -m stochastic_depth -- train RECIPE
"""
COMPARE_ABOUT = """Train a recipe and its constant-depth twin, taking turns by the epoch; show both
in tables and a picture: errors, seconds, the saving measured and expected.

Started again it resumes where it stopped, and trains nothing twice.
"""
RECIPES_ABOUT = "List the recipes, or show one: source, command, published result and cost."


@dataclass(frozen=True)
class Begin:
    config: Annotated[Config, tyro.conf.arg(name="")]
    run: Folder = None
    """The run folder (none: runs/RECIPE, or the first of runs/RECIPE-2, ... that does not
    exist)."""
    quiet: Flag = False
    """Print nothing."""


@dataclass(frozen=True)
class Resume:
    """Resume a run that was stopped."""

    resume: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """Resume this run from its newest checkpoint, with the configuration it began with."""
    data: Folder = None
    """Where its data is now (none: where it was)."""
    device: str | None = None
    """Where to compute from here on, in the precision of the run (none: on the device it began
    on). The seconds in its journal are then of two devices."""
    quiet: Flag = False
    """Print nothing."""


@dataclass(frozen=True)
class Compare:
    config: Annotated[Config, tyro.conf.arg(name="")]
    seeds: int = 3
    """How many seeds, from `seed` on."""
    minutes: float | None = None
    """About how long it may take. On a slow machine fewer seeds or epochs are then trained."""
    out: Folder = None
    """The folder for the runs, the picture and the JSON (none: runs/compare-RECIPE)."""
    quiet: Flag = False
    """Print only the tables."""

    def check(self) -> None:
        at_least(1, seeds=self.seeds)
        if self.minutes is not None and not self.minutes > 0:
            raise ConfigError(f"--minutes is {self.minutes}: it must be above 0")
        if self.config.survival.rule == "constant":
            raise ConfigError(
                f"{self.config.recipe} has constant depth already: compare a stochastic one"
            )


@dataclass(frozen=True)
class Evaluate:
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run folder."""
    checkpoint: CheckpointName = "best"
    """The checkpoint of the lowest validation error, or the newest."""
    data: Folder = None
    """Where its data is now (none: where it was)."""
    device: str | None = None
    """Where to compute (none: on the device the run began on)."""


def train(arguments: list[str]) -> int:
    if any(argument.split("=")[0] == "--resume" for argument in arguments):
        _check_resume(arguments)
        asked = parse(Resume, "train", arguments)
        assert asked.resume is not None
        require_run(asked.resume)
        return _in_all_processes(lambda console: _resume(asked, console), asked.quiet)
    common = "--run DIR", "--model.depth INT", "--survival.final FLOAT"
    begun = parse_recipe("train", TRAIN_ABOUT, arguments, Begin, common)
    refuse_without_effect([begun.config], arguments)
    return _in_all_processes(lambda console: _begin(begun, console), begun.quiet)


def _check_resume(arguments: list[str]) -> None:
    known = ("--resume", "--data", "--device", "--quiet", "--help")
    for argument in arguments:
        name = argument.split("=")[0]
        if name == "--data.root":
            refuse("--data.root cannot be given with --resume: give --data DIR")
        if name == "--epochs":
            refuse(
                "--epochs cannot be given with --resume: a run cannot be extended, its learning "
                "rate and its schedule are fixed by the epochs it began with. Begin another run "
                "with more: stochastic-depth train RECIPE --epochs N --run FOLDER"
            )
        if name.startswith("--") and name not in known:
            refuse(
                f"{name} cannot be given with --resume, which keeps the configuration that the "
                "run began with: leave it out, or begin another run with it"
            )


def _in_all_processes(work: "Callable[[PlainConsole], int]", quiet: bool) -> int:
    """Call `work` in each process that torchrun has started; only the first one prints."""
    from stochastic_depth.cli.console import PlainConsole

    with PlainConsole(quiet=quiet).starting():
        from stochastic_depth.distributed.world import is_primary, torchrun_process_group
    with torchrun_process_group():
        return work(PlainConsole(quiet=quiet or not is_primary()))


def _resume(asked: Resume, console: "PlainConsole") -> int:
    from stochastic_depth.train import reopen

    assert asked.resume is not None
    return _train(*reopen(asked.resume, asked.data, asked.device), console)


def _begin(begun: Begin, console: "PlainConsole") -> int:
    from stochastic_depth.distributed.world import may_restart, on_primary, restarts
    from stochastic_depth.train import begin, reopen
    from stochastic_depth.train.run_folder import free_path

    if begun.run is None and may_restart():
        raise ConfigError(
            "torchrun may start this again: give --run DIR, so that it resumes that run"
        )
    if begun.run is not None and restarts() and on_primary(begun.run.exists):
        run, batches = reopen(begun.run)
        if run.config != begun.config:
            raise RunError(f"{begun.run} is a run of another configuration: choose another --run")
        return _train(run, batches, console)
    path = begun.run or on_primary(lambda: free_path(Path("runs"), begun.config.recipe))
    return _train(*begin(begun.config, path), console)


def _train(run: "Run", batches: "Batches", console: "PlainConsole") -> int:
    from stochastic_depth.distributed.world import is_primary, world_size
    from stochastic_depth.train import fit
    from stochastic_depth.train.display import Display
    from stochastic_depth.train.signals import StopSignals

    config, runtime = run.config, run.runtime
    console.say(
        f"{config.recipe}: {config.model.kind} {config.model.depth}, {batches.sizes['train']:,} "
        f"images → {run.path}"
    )
    processes = f", {world_size()} processes" if world_size() > 1 else ""
    # Wrapped on a terminal, one line elsewhere.
    console.print(f"{runtime}{processes}", soft_wrap=not console.is_terminal)
    with StopSignals() as stop, Display(console, console.quiet) as display:
        try:
            for _ in fit(run, batches, display.show(), stop):
                pass
        except Interrupted as interrupted:
            again = command("train", "--resume", run.path)
            return _say_how_to_resume(console, interrupted, again)
    if is_primary():
        console.print(run_table(run))
    return 0


def run_table(run: "Run") -> "Table":
    """Errors of a finished run, at its best and its last epoch."""
    from rich.table import Table

    from stochastic_depth.train import best_record

    records = run.records()
    table = Table(title=str(run.path), title_justify="left")
    table.add_column("")
    for column in ("epoch", "validation error", "test error"):
        table.add_column(column, justify="right")
    for name, record in (("best validation", best_record(records)), ("last", records[-1])):
        validation, test = f"{record.validation_error:.2f} %", f"{record.test_error:.2f} %"
        table.add_row(name, epoch_text(record.epoch), validation, test)
    return table


def _say_how_to_resume(console: "PlainConsole", interrupted: Interrupted, again: str) -> int:
    """Print how to resume; returns the exit code."""
    console.say(f"{interrupted}")
    console.say(f"resume:  {again}")
    return 128 + interrupted.signal


def compare(arguments: list[str]) -> int:
    began = time.monotonic()
    common = "--seeds INT", "--minutes FLOAT", "--out DIR", "--model.depth INT"
    asked = parse_recipe("compare", COMPARE_ABOUT, arguments, Compare, common)
    refuse_without_effect([asked.config], arguments)
    from stochastic_depth.cli.console import PlainConsole

    console, config = PlainConsole(), asked.config
    with console.starting():
        require_report()
        from stochastic_depth.lab import comparison
        from stochastic_depth.lab.pace import SECONDS_AT_END
        from stochastic_depth.lab.tables import tables
        from stochastic_depth.train.display import Display
        from stochastic_depth.train.signals import StopSignals
    folder = asked.out or Path("runs") / f"compare-{config.recipe}"
    seeds = range(config.seed, config.seed + asked.seeds)
    end = math.inf
    if asked.minutes is not None:
        end = began + 60 * asked.minutes - SECONDS_AT_END
        config = _fit_epochs(config, seeds, folder, end, console)
    with StopSignals() as stop, Display(console, asked.quiet) as display:
        try:
            runs = comparison.train_pairs(config, seeds, folder, display, stop, end)
        except Interrupted as interrupted:
            return _say_how_to_resume(console, interrupted, command("compare", *arguments))
    found = comparison.compare_runs(runs)
    console.say(found.title)
    console.print(*(table.rich() for table in tables(found)))
    for remark in comparison.remarks(found, asked.config.epochs, asked.seeds):
        console.print(remark)
    for path in comparison.write_comparison(folder, found, runs):
        console.say(str(path))
    return 0


def _fit_epochs(
    config: Config, seeds: Sequence[int], folder: Path, end: float, console: "PlainConsole"
) -> Config:
    """`config`, with the epochs of the runs that have begun, or with as many as fit until `end`.

    Only where none has begun, training steps are timed, which chooses the number of threads too.
    """
    from stochastic_depth.lab.comparison import runs_in
    from stochastic_depth.lab.pace import measure_pace

    if begun := runs_in(folder, seeds):
        epochs = begun[0].config.epochs
    else:
        console.print("measuring how long a training step takes here")
        pace = measure_pace(config)
        console.print(str(pace))
        epochs = pace.epochs_in(end - time.monotonic(), config.epochs)
    if epochs <= (warmup := config.optimizer.warmup_epochs) and warmup:
        raise ConfigError(
            f"within the time that --minutes leaves, each run has {epochs} epochs, and "
            f"--optimizer.warmup-epochs is {warmup}: give more --minutes, or fewer of these"
        )
    if epochs < config.epochs:
        console.print(
            f"training for {epochs} of {config.epochs} epochs, to end in time: without --minutes, "
            "and with another --out, it trains for all of them"
        )
    return replace(config, epochs=epochs)


def eval(arguments: list[str]) -> int:
    about = "Loss and error of a trained network at full depth."
    asked = parse(Evaluate, "eval", arguments, about)
    require_run(asked.run)
    from stochastic_depth.cli.console import PlainConsole

    console = PlainConsole()
    with console.starting():
        from stochastic_depth.train import reopen, trained_model
        from stochastic_depth.train.step import evaluate_parts
    run, batches = reopen(asked.run, asked.data, asked.device)
    model, step = trained_model(run, batches, asked.checkpoint)
    from rich.table import Table

    table = Table(
        title=f"{run.path}, {asked.checkpoint} checkpoint (step {step})", title_justify="left"
    )
    for name in ("part", "images", "loss", "error"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for part, (loss, error) in evaluate_parts(model, batches, run.runtime).items():
        table.add_row(part, f"{batches.sizes[part]:,}", f"{loss:.4f}", f"{error:.2f} %")
    console.print(table)
    return 0


def recipes(arguments: list[str]) -> int:
    from stochastic_depth.cli.console import PlainConsole

    console = PlainConsole()
    summaries = {name: describe_recipe(name).splitlines()[0] for name in RECIPES}
    if not arguments:
        from rich.table import Table

        table = Table()
        table.add_column("recipe", no_wrap=True)
        table.add_column("what")
        for name, summary in summaries.items():
            table.add_row(name, summary)
        console.print(table)
        return 0
    name, more = choose("stochastic-depth recipes", RECIPES_ABOUT, "recipe", summaries, arguments)
    if more:
        refuse(f"{shlex.join(more)} is too much: give one recipe, or none")
    console.print(describe_recipe(name))
    console.print_json(json.dumps(RECIPES[name]().to_json()))
    return 0
