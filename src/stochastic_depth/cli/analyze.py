"""stochastic-depth analyze: one question about runs at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from stochastic_depth.choices import CheckpointName
from stochastic_depth.cli.arguments import Flag, choose, parse, require_run
from stochastic_depth.errors import ConfigError, RunError
from stochastic_depth.lab.options import PruningOptions
from stochastic_depth.plain_text import command
from stochastic_depth.train.checks import at_least

if TYPE_CHECKING:
    from stochastic_depth.cli.console import PlainConsole
    from stochastic_depth.export.depths import Progress
    from stochastic_depth.lab.experiments import Experiment
    from stochastic_depth.lab.recorded import TrainedNetwork


@dataclass(frozen=True)
class Question:
    """One question about finished or unfinished runs."""

    runs: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="RUN...", help_behavior_hint=""),
    ]
    """The run folders. Runs on the same data that differ only in their seed form one group."""

    def check(self) -> None:
        if not self.runs:
            raise ConfigError("no RUN is given: name one run folder or several")

    def experiments(self) -> list["Experiment"]:
        """The runs in groups.

        Raises:
            ConfigError: when two of them are of the same seed.
            RunError: when one of them has no record yet.
        """
        from stochastic_depth.lab.experiments import distinct, experiments
        from stochastic_depth.lab.recorded import read_run

        runs = [read_run(path) for path in self.runs]
        for run in runs:
            if not run.records:
                path = run.run.path
                if run.failed:
                    raise RunError(
                        f"{path} has measured nothing, it failed: {run.failure}. Leave this run out"
                    )
                raise RunError(
                    f"{path} has measured nothing yet, its journal is empty: resume it by "
                    + command("train", "--resume", path)
                )
        kept = distinct(runs)
        for run in runs:
            if run not in kept:
                (same,) = (each for each in kept if len(distinct([each, run])) == 1)
                raise ConfigError(
                    f"{same.run.path} and {run.run.path} have the same configuration, data and "
                    "seed: name one of them"
                )
        return experiments(runs)


def _titled(experiments: list["Experiment"], console: "PlainConsole") -> Iterator["Experiment"]:
    """Each experiment; if there are several, with its title printed before."""
    for experiment in experiments:
        if len(experiments) > 1:
            console.say(experiment.title)
        yield experiment


@dataclass(frozen=True)
class NetworkQuestion(Question):
    """A question that needs the trained networks, not only their journals."""

    checkpoint: CheckpointName = "best"
    """The checkpoint of the lowest validation error, or the newest."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where their data is now (none: where it was)."""
    device: str | None = None
    """Where to compute (none: on the device the run began on)."""
    again: Flag = False
    """Measure the networks again, even if their folders have a result with the same settings."""

    def networks(self, experiments: list["Experiment"]) -> Iterator["TrainedNetwork"]:
        """The trained networks, one at a time."""
        from stochastic_depth.lab.recorded import load_trained

        for experiment in experiments:
            for recorded in experiment.runs:
                yield load_trained(recorded.run.path, self.data, self.checkpoint, self.device)

    def measured(
        self,
        experiments: list["Experiment"],
        measure: "Callable[[TrainedNetwork, Progress], Any]",
        console: "PlainConsole",
    ) -> dict[str, Any]:
        """The result of `measure` for each network, by the id of its run."""
        found: dict[str, Any] = {}
        for network in self.networks(experiments):
            with console.progress(network.run.path.name) as progress:
                found[network.run.id] = measure(network, progress)
        return found


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

        for experiment in _titled(self.experiments(), console):
            epochs = list(self.epochs) or question.spread_epochs(experiment.runs)
            found = {s.name: question.gradients(s.runs, epochs) for s in experiment.series}
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

        runs = (run for experiment in self.experiments() for run in experiment.runs)
        for run in runs:
            found = active_blocks([run])
            console.print(active_table(str(run.run.path), found))
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

        def measure(network: "TrainedNetwork", progress: "Progress") -> Any:
            return question.load_or_measure_ensemble(
                network, self.subnetworks, self.seed, progress, self.again, console.say
            )

        asked = self.experiments()
        for recorded in (run for experiment in asked for run in experiment.runs):
            question.require_ensemble(recorded.run)
        found = self.measured(asked, measure, console)
        for experiment in _titled(asked, console):
            for series in experiment.series:
                of_runs = [found[run.run.id] for run in series.runs]
                alone = len(of_runs) == 1
                title = f"{series.name}, {runs_text(len(of_runs))}"
                title = str(series.runs[0].run.path) if alone else title
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

        def measure(network: "TrainedNetwork", progress: "Progress") -> Any:
            return question.load_or_measure_curves(
                network, self.settings, progress, self.again, console.say
            )

        asked = self.experiments()
        found = self.measured(asked, measure, console)
        for experiment in _titled(asked, console):
            curves = {s.name: [found[run.run.id] for run in s.runs] for s in experiment.series}
            for order in question.ORDERS:
                console.print(question.pruning_table(order, curves))


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
