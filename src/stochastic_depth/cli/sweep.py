"""stochastic-depth sweep survival | depth | gates [RECIPE] [OPTIONS]."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

from stochastic_depth.cli import usage_error
from stochastic_depth.cli.console import PlainConsole
from stochastic_depth.cli.recipe import parse
from stochastic_depth.errors import ConfigError
from stochastic_depth.lab.sweep.folder import Grid, Kind, Rule, Sweep, open_sweep
from stochastic_depth.lab.sweep.progress import Progress, sweep_table
from stochastic_depth.lab.sweep.workers import Queue, Workers
from stochastic_depth.recipes.paper import gatings
from stochastic_depth.train import Config
from stochastic_depth.train.fit import StopSignals

KINDS: dict[Kind, str] = {
    "survival": "p_L for linear decay and uniform, and the constant-depth line",
    "depth": "p_L against depth",
    "gates": "ways of gating at equal rates, and constant depth",
}
HELP = """usage: stochastic-depth sweep KIND [RECIPE] [OPTIONS]

Train a recipe at every point of a grid, from several seeds. KIND is one of

{kinds}

stochastic-depth sweep KIND --help lists the recipes.
"""
TEXT = """Train a recipe at every point of a grid:
{kind}.

The same command again, on this machine or on another that shares the folder,
joins in. Whatever is killed, the others go on with; nothing is trained twice.
"""
SWEPT: dict[Kind, dict[str, str]] = {
    "survival": {"--survival.final": "--survival", "--survival.rule": "--rules"},
    "depth": {"--survival.final": "--survival", "--model.depth": "--depths"},
    "gates": dict.fromkeys(
        ("--survival.gate", "--survival.balance", "--survival.closed", "--schedule"), "--gatings"
    ),
}
SURVIVAL = tuple(tenths / 10 for tenths in range(1, 11))


@dataclass(frozen=True)
class Options:
    config: Annotated[Config, tyro.conf.arg(name="")]
    survival: tuple[float, ...] = SURVIVAL
    """The values of p_L."""
    seeds: int = 5
    """How many seeds, from `seed` on."""
    workers: int = 1
    """Processes that train at the same time (1, where seconds are to be compared)."""
    threads: int | None = None
    """Of each worker (none: the processor's, shared out)."""
    storage: str | None = None
    """postgresql://user:password@host/database for the queue (none: a file in the folder)."""
    out: Path | None = None
    """Folder for the runs (none: runs/sweep-KIND-RECIPE)."""
    quiet: bool = False
    """Print only the table."""


@dataclass(frozen=True)
class Survival(Options):
    rules: tuple[Rule, ...] = ("linear", "uniform", "constant")
    """Survival rules; constant depth has no p_L and is trained once for each seed."""

    def grid(self, seeds: tuple[int, ...]) -> Grid:
        return Grid(self.rules, self.survival, (self.config.model.depth,), seeds)


@dataclass(frozen=True)
class Depth(Options):
    depths: tuple[int, ...] = (20, 38, 56, 74, 92, 110)
    """Weighted layers of the networks."""

    def grid(self, seeds: tuple[int, ...]) -> Grid:
        if self.config.survival.rule == "constant":
            raise ConfigError(f"{self.config.recipe} has constant depth: sweep a stochastic one")
        return Grid((self.config.survival.rule,), self.survival, self.depths, seeds)


@dataclass(frozen=True)
class Gates(Options):
    survival: tuple[float, ...] = (0.5,)
    """The values of p_L."""
    gatings: tuple[str, ...] = tuple(gatings(Config()))
    """Ways of gating; constant depth among them is trained once for each seed."""

    def grid(self, seeds: tuple[int, ...]) -> Grid:
        if self.config.survival.rule == "constant":
            raise ConfigError(f"{self.config.recipe} has constant depth: sweep a stochastic one")
        for name in self.gatings:
            if name not in gatings(self.config):
                known = ", ".join(gatings(self.config))
                raise ConfigError(f"there is no gating {name!r}: choose among {known}")
        if len(self.survival) != 1:
            raise ConfigError("sweep gates compares at equal rates: give --survival one value")
        rule, depth = self.config.survival.rule, self.config.model.depth
        return Grid((rule,), self.survival, (depth,), seeds, self.gatings)


def main(arguments: list[str]) -> int:
    kind, *rest = arguments or ["--help"]
    if kind in ("-h", "--help"):
        print(HELP.format(kinds="\n".join(f"  {name:9} {what}" for name, what in KINDS.items())))
        return 0
    if kind not in KINDS:
        return usage_error("sweep", kind, KINDS)
    _refuse_what_is_swept(kind, rest)
    options = {"survival": Survival, "depth": Depth, "gates": Gates}[kind]
    asked = parse(f"sweep {kind}", TEXT.format(kind=KINDS[kind]), rest, options)
    config = asked.config
    for name in ("seeds", "workers", "threads"):
        value = getattr(asked, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}: it must be at least 1")
    grid = asked.grid(tuple(range(config.seed, config.seed + asked.seeds)))
    folder = asked.out or Path("runs") / f"sweep-{kind}-{config.recipe}"
    return _run(open_sweep(folder, kind, grid, config), asked, shlex.join(["sweep", *arguments]))


def _run(sweep: Sweep, asked: Options, again: str) -> int:
    console = PlainConsole()
    queue = Queue(sweep, asked.storage)
    threads = asked.threads or max(1, torch.get_num_threads() // asked.workers)
    with (
        StopSignals() as stop,
        Progress(sweep, console, asked.quiet) as progress,
        Workers(sweep, asked.storage, asked.workers, threads) as workers,
    ):
        while workers.working() and not stop():
            progress.look(queue.running())
        progress.look([])
    points = sweep.grid.points()
    for point in filter(sweep.failure, points):
        _print(console, f"{point.name} failed: {sweep.failure(point)}")
    console.print(sweep_table(sweep))
    _print(console, str(sweep.folder))
    left = sum(not sweep.ended(point) for point in points)
    if left:
        _print(console, f"{left} of {len(points)} runs are not finished")
        _print(console, f"go on:  stochastic-depth {again}")
    signal = stop()
    return 128 + signal if signal else int(left > 0)


def _refuse_what_is_swept(kind: Kind, arguments: list[str]) -> None:
    """Options of the recipe that the grid would override in silence."""
    for argument in arguments:
        name = argument.split("=")[0]
        if name in SWEPT[kind]:
            raise ConfigError(f"{name} is swept: give {SWEPT[kind][name]} instead")


def _print(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True)
