"""stochastic-depth analyze: one question about runs at a time."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from stochastic_depth.choices import CheckpointName
from stochastic_depth.cli.arguments import Flag, choose, parse, require_run
from stochastic_depth.errors import ConfigError
from stochastic_depth.lab.options import PruningOptions
from stochastic_depth.train.checks import at_least

if TYPE_CHECKING:
    from stochastic_depth.cli.console import PlainConsole
    from stochastic_depth.lab.sources import TrainedNetwork
    from stochastic_depth.train import Run


@dataclass(frozen=True)
class Question:
    """One question about finished or unfinished runs."""

    runs: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="RUN...", help_behavior_hint=""),
    ]
    """The run folders. Runs that differ only in their seed form one group."""

    def check(self) -> None:
        if not self.runs:
            raise ConfigError("no RUN is given: name one run folder or several")

    def opened(self) -> list["Run"]:
        """The opened runs; a run and its copies count once."""
        from stochastic_depth.train import open_run

        runs = {run.id: run for run in map(open_run, reversed(self.runs))}
        return list(runs.values())[::-1]


@dataclass(frozen=True)
class NetworkQuestion(Question):
    """A question that needs the trained networks, not only their journals."""

    checkpoint: CheckpointName = "best"
    """The checkpoint of the lowest validation error, or the newest."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where their data is now (none: where it was)."""
    again: Flag = False
    """Measure the networks again, even if their folders have a result with the same settings."""

    def networks(self, runs: list["Run"]) -> Iterator["TrainedNetwork"]:
        """The trained networks, one at a time."""
        from stochastic_depth.lab.sources import load_trained

        for run in runs:
            yield load_trained(run.path, self.data, self.checkpoint)


@dataclass(frozen=True)
class GradientStrength(Question):
    """Mean absolute gradients over training and over depth; reads only journals."""

    epochs: tuple[float, ...] = ()
    """Which epochs of the journals are shown (none: five, from the first to the last)."""
    blocks: int = 18
    """How many blocks to show, evenly spread from the first to the last; at least these 2."""

    def check(self) -> None:
        super().check()
        at_least(2, blocks=self.blocks)

    def print(self, console: "PlainConsole") -> None:
        from stochastic_depth.lab import gradients as question
        from stochastic_depth.lab.outcomes import group_runs

        runs = self.opened()
        epochs = list(self.epochs) or question.spread_epochs(runs)
        found = {
            name: question.gradients(of_kind, epochs) for name, of_kind in group_runs(runs).items()
        }
        console.print(question.first_table(epochs, found))
        for name, of_kind in found.items():
            if all(of_kind.blocks):
                console.print(question.block_table(name, epochs, of_kind, self.blocks))
            else:
                console.say(f"{name}: no gradients of blocks in the journal")


@dataclass(frozen=True)
class Active(Question):
    """How many blocks were active, against the exact distribution; reads only journals."""

    def print(self, console: "PlainConsole") -> None:
        from stochastic_depth.lab.active_blocks import active_blocks, active_table

        for run in self.opened():
            found = active_blocks(run)
            console.print(active_table(str(run.path), found))
            drawn, exact = found.moments()
            console.print(
                f"mean {drawn[0]:.2f} (exact {exact[0]:.2f}), deviation {drawn[1]:.2f} (exact "
                f"{exact[1]:.2f});\nchi-square test that the one follows the other: "
                f"p = {found.p_value():.2g}"
            )


@dataclass(frozen=True)
class Ensemble(NetworkQuestion):
    """Test error and calibration of the full network and of sampled subnetworks."""

    subnetworks: int = 64
    """How many subnetworks to sample; means are shown for 1, 2, 4, ... of them."""
    seed: int = 0
    """Chooses the sampled subnetworks."""

    def check(self) -> None:
        super().check()
        at_least(1, subnetworks=self.subnetworks)

    def print(self, console: "PlainConsole") -> None:
        from stochastic_depth.lab import ensemble as question
        from stochastic_depth.lab.formatting import runs_text
        from stochastic_depth.lab.outcomes import group_runs
        from stochastic_depth.lab.sources import analysis_path

        runs = self.opened()
        for run in runs:
            question.refuse_constant(run)
        found: dict[str, Any] = {}
        for network in self.networks(runs):
            with console.progress(network.run.path.name) as progress:
                found[network.run.id] = question.load_or_measure_ensemble(
                    network, self.subnetworks, self.seed, progress, self.again
                )
            console.say(str(analysis_path(network.run, "ensemble")))
        for name, of_kind in group_runs(runs).items():
            of_runs = [found[run.id] for run in of_kind]
            alone = len(of_kind) == 1
            title = str(of_kind[0].path) if alone else f"{name}, {runs_text(len(of_kind))}"
            console.print(question.ensemble_table(title, of_runs))


@dataclass(frozen=True)
class Pruning(NetworkQuestion):
    """Test error, parameters and time without the last blocks, or without the least needed ones."""

    settings: Annotated[PruningOptions, tyro.conf.arg(name="")] = field(
        default_factory=PruningOptions
    )

    def check(self) -> None:
        super().check()
        self.settings.check()

    def print(self, console: "PlainConsole") -> None:
        from stochastic_depth.lab import pruning as question
        from stochastic_depth.lab.outcomes import group_runs
        from stochastic_depth.lab.sources import analysis_path

        runs = self.opened()
        found: dict[str, Any] = {}
        for network in self.networks(runs):
            with console.progress(network.run.path.name) as progress:
                found[network.run.id] = question.load_or_measure_curves(
                    network, self.settings, progress, self.again
                )
            console.say(str(analysis_path(network.run, "pruning")))
        of_kinds = {
            name: [found[run.id] for run in of_kind] for name, of_kind in group_runs(runs).items()
        }
        for order in question.ORDERS:
            console.print(question.pruning_table(order, of_kinds))


QUESTIONS = {
    "gradients": GradientStrength,
    "active": Active,
    "ensemble": Ensemble,
    "pruning": Pruning,
}


def analyze(arguments: list[str]) -> int:
    about = "Look into runs: their gradients, their ensemble, and what they can spare."
    questions = {name: str(kind.__doc__) for name, kind in QUESTIONS.items()}
    name, rest = choose("stochastic-depth analyze", about, "question", questions, arguments)
    asked = parse(QUESTIONS[name], f"analyze {name}", rest)
    for path in asked.runs:
        require_run(path)
    from stochastic_depth.cli.console import PlainConsole

    console = PlainConsole()
    with console.starting():
        import torch  # noqa: F401
    asked.print(console)
    return 0
