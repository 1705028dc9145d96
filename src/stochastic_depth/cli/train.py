"""stochastic-depth train [RECIPE] [OPTIONS], or train --resume RUN."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from stochastic_depth.cli.console import PlainConsole
from stochastic_depth.cli.recipe import parse
from stochastic_depth.data import Batches
from stochastic_depth.distributed.world import (
    is_primary,
    joined,
    may_restart,
    on_primary,
    ranks,
    restarts,
)
from stochastic_depth.errors import ConfigError, RunError
from stochastic_depth.train import Config, Interrupted, Run, begin, best_record, fit, reopen
from stochastic_depth.train.display import Display
from stochastic_depth.train.fit import StopSignals
from stochastic_depth.train.run import free_path

TEXT = """Train one network; everything is written to one run folder.
By N processes:  torchrun --nproc-per-node N -m stochastic_depth -- train RECIPE

  --resume RUN        go on with a run from its newest checkpoint
  --data DIR          with --resume: where its data is now
  --quiet             print nothing
"""


@dataclass(frozen=True)
class Begin:
    config: Annotated[Config, tyro.conf.arg(name="")]
    run: Path | None = None
    """The run folder (none: runs/RECIPE, or the first of runs/RECIPE-2, ... that is free)."""
    quiet: bool = False
    """Print nothing."""


@dataclass(frozen=True)
class Resume:
    resume: Annotated[Path, tyro.conf.arg(metavar="RUN")]
    """The run folder to go on with."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where its data is now (none: where it was)."""
    quiet: bool = False
    """Print nothing."""


def main(arguments: list[str]) -> int:
    with joined():
        return _main(arguments)


def _main(arguments: list[str]) -> int:
    if any(argument.split("=")[0] == "--resume" for argument in arguments):
        resume = tyro.cli(Resume, prog="stochastic-depth train", args=arguments)
        return _train(*reopen(resume.resume, resume.data), resume.quiet)
    begun = parse("train", TEXT, arguments, Begin)
    if begun.run is None and may_restart():
        raise ConfigError("torchrun may start this anew: say --run DIR, to go on with that run")
    if begun.run is not None and restarts() and on_primary(begun.run.exists):
        run, images = reopen(begun.run)
        if run.config != begun.config:
            raise RunError(f"{begun.run} is a run of another configuration: choose another --run")
        return _train(run, images, begun.quiet)
    path = begun.run or on_primary(lambda: free_path(Path("runs"), begun.config.recipe))
    return _train(*begin(begun.config, path), begun.quiet)


def _train(run: Run, images: Batches, quiet: bool) -> int:
    quiet = quiet or not is_primary()
    console = PlainConsole(quiet=quiet)
    config, execution = run.config, run.execution
    console.print(
        f"{config.recipe}: {config.model.kind} {config.model.depth}, {images.sizes['train']:,} "
        f"images → {run.path}\n{execution.described()}"
        + (f", {ranks()} processes" if ranks() > 1 else ""),
        soft_wrap=True,
    )
    with StopSignals() as stop, Display(console, quiet) as display:
        try:
            for _ in fit(run, images, display.watch(), stop):
                pass
        except Interrupted as interrupted:
            return stopped(console, interrupted, f"train --resume {shlex.quote(str(run.path))}")
    if is_primary():
        console.print(run_table(run))
    return 0


def run_table(run: Run) -> Table:
    """Errors of a finished run, at its best and its last epoch."""
    records = run.records()
    table = Table(title=str(run.path), title_justify="left")
    table.add_column("")
    for column in ("epoch", "validation error", "test error"):
        table.add_column(column, justify="right")
    for name, record in (("best validation", best_record(records)), ("last", records[-1])):
        validation, test = f"{record.validation_error:.2f} %", f"{record.test_error:.2f} %"
        table.add_row(name, f"{record.epoch:g}", validation, test)
    return table


def stopped(console: Console, interrupted: Interrupted, again: str) -> int:
    """Say how to go on; returns the exit code."""
    console.print(f"{interrupted}", soft_wrap=True)
    console.print(f"go on:  stochastic-depth {again}", soft_wrap=True)
    return 128 + interrupted.signal
