"""stochastic-depth sweep: train a recipe at every point of a grid."""

import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from stochastic_depth.choices import RuleName, SweepKind
from stochastic_depth.cli.arguments import (
    Flag,
    choose,
    config_errors_refused,
    options_in,
    parse_recipe,
    refuse,
    refuse_without_effect,
)
from stochastic_depth.errors import ConfigError
from stochastic_depth.lab.options import check_gatings
from stochastic_depth.recipes.paper import gatings
from stochastic_depth.train.checks import at_least, check_probability
from stochastic_depth.train.config import Config

if TYPE_CHECKING:
    from stochastic_depth.cli.console import PlainConsole
    from stochastic_depth.lab.sweep.folder import Sweep
    from stochastic_depth.lab.sweep.grid import Grid


ABOUT = """Train a recipe at every point of a grid, from several seeds.

The same command again, on this machine or on another that shares the folder,
joins in. If a worker is killed, another one resumes its run; nothing is trained
twice.
"""
KINDS: dict[SweepKind, str] = {
    "survival": "values of p_L for linear decay and uniform, and constant depth",
    "depth": "values of p_L at several depths",
    "gates": "every way of gating at equal rates, and constant depth",
}
COMMON: dict[SweepKind, tuple[str, ...]] = {
    "survival": ("--survival FLOAT...", "--rules RULE...", "--model.depth INT"),
    "depth": ("--survival FLOAT...", "--depths INT..."),
    "gates": ("--survival FLOAT", "--gatings GATING...", "--model.depth INT"),
}
"""The options of each sweep that are used most."""
SWEPT: dict[SweepKind, dict[str, str]] = {
    "survival": {"--survival.final": "--survival", "--survival.rule": "--rules"},
    "depth": {"--survival.final": "--survival", "--model.depth": "--depths"},
    "gates": dict.fromkeys(
        ("--survival.gate", "--survival.balance", "--survival.closed", "--schedule"), "--gatings"
    ),
}
"""Options of the recipe that the grid would silently override, and the options to give instead."""
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
    """Threads of each worker (none: the processor's, divided among the workers)."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder for the runs (none: runs/sweep-KIND-RECIPE)."""
    quiet: Flag = False
    """Print only the table."""

    def check(self) -> None:
        at_least(1, seeds=self.seeds, workers=self.workers, threads=self.threads)
        for final in self.survival:
            check_probability("--survival", final)

    def chosen_seeds(self) -> tuple[int, ...]:
        return tuple(range(self.config.seed, self.config.seed + self.seeds))

    def stochastic_rule(self) -> RuleName:
        """The survival rule of the recipe; raises `ConfigError` if it is constant depth."""
        rule = self.config.survival.rule
        if rule == "constant":
            raise ConfigError(f"{self.config.recipe} has constant depth: sweep a stochastic one")
        return rule


@dataclass(frozen=True)
class SurvivalSweep(Options):
    rules: tuple[RuleName, ...] = ("linear", "uniform", "constant")
    """Survival rules; constant depth has no p_L and is trained once for each seed."""

    def grid(self) -> "Grid":
        from stochastic_depth.lab.sweep.grid import Grid

        return Grid(self.rules, self.survival, (self.config.model.depth,), self.chosen_seeds())


@dataclass(frozen=True)
class DepthSweep(Options):
    depths: tuple[int, ...] = (20, 38, 56, 74, 92, 110)
    """Weighted layers of the networks."""

    def grid(self) -> "Grid":
        from stochastic_depth.lab.sweep.grid import Grid

        return Grid((self.stochastic_rule(),), self.survival, self.depths, self.chosen_seeds())


@dataclass(frozen=True)
class GatesSweep(Options):
    survival: tuple[float, ...] = (0.5,)
    """The values of p_L."""
    gatings: tuple[str, ...] = tuple(gatings(Config()))
    """Ways of gating; constant depth among them is trained once for each seed."""

    def grid(self) -> "Grid":
        from stochastic_depth.lab.sweep.grid import Grid

        rule, depth = self.stochastic_rule(), self.config.model.depth
        check_gatings(self.gatings)
        if len(self.survival) != 1:
            raise ConfigError("sweep gates compares at equal rates: give --survival one value")
        return Grid((rule,), self.survival, (depth,), self.chosen_seeds(), self.gatings)


OPTIONS: dict[SweepKind, type[SurvivalSweep | DepthSweep | GatesSweep]] = {
    "survival": SurvivalSweep,
    "depth": DepthSweep,
    "gates": GatesSweep,
}


def sweep(arguments: list[str]) -> int:
    kind, rest = choose("stochastic-depth sweep", ABOUT, "sweep", KINDS, arguments)
    given = options_in(rest)
    for swept, instead in SWEPT[kind].items():
        for option in given:
            if option == swept or option.startswith(f"{swept}."):
                refuse(f"{option} is swept: give {instead} instead")
    about = f"{ABOUT}\nThe grid has {KINDS[kind]}."
    common = *COMMON[kind], "--seeds INT", "--workers INT", "--out DIR"
    asked = parse_recipe(f"sweep {kind}", about, rest, OPTIONS[kind], common)
    from stochastic_depth.cli.console import PlainConsole

    console = PlainConsole()
    with console.starting():
        from stochastic_depth.lab.sweep.folder import open_sweep
    folder = asked.out or Path("runs") / f"sweep-{kind}-{asked.config.recipe}"
    with config_errors_refused():
        grid = asked.grid()
        configs = [point.of(asked.config) for point in grid.points()]
    refuse_without_effect(configs, rest)
    opened = open_sweep(folder, kind, grid, asked.config)
    return _run(opened, asked, console, shlex.join(["sweep", *arguments]))


def _run(sweep: "Sweep", asked: Options, console: "PlainConsole", again: str) -> int:
    import torch

    from stochastic_depth.lab.sweep.progress import SweepProgress, sweep_table
    from stochastic_depth.lab.sweep.workers import Workers, read_claims
    from stochastic_depth.plain_text import count_text
    from stochastic_depth.train.signals import StopSignals

    threads = asked.threads or max(1, torch.get_num_threads() // asked.workers)
    with (
        StopSignals() as stop,
        SweepProgress(sweep, console, asked.quiet) as progress,
        Workers(sweep, asked.workers, threads) as workers,
    ):
        told: Counter[int] = Counter()
        while workers.working() and not stop():
            progress.look(read_claims(sweep))
            for signal in (Counter(workers.killed()) - told).elements():
                progress.say(f"a worker was killed by signal {signal}; another one resumes its run")
                told[signal] += 1
        progress.look([])
        killed = workers.killed()
    points = sweep.grid.points()
    failed = {point: why for point in points if (why := sweep.failure(point)) is not None}
    for point, why in failed.items():
        console.say(f"{point.name} failed: {why}")
    left = sum(not sweep.ended(point) for point in points)
    console.print(sweep_table(sweep))
    console.say(str(sweep.folder))
    if left:
        lost = f", {count_text(len(killed), 'worker')} killed" if killed else ""
        console.say(f"{left} of {len(points)} runs are not finished{lost}")
        console.say(f"resume:  stochastic-depth {again}")
    if signal := stop():
        return 128 + signal
    return int(left > 0 or len(failed) == len(points))
