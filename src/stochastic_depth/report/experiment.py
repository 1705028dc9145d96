"""Runs that differ in nothing but survival and seed: what a figure compares."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby

from stochastic_depth.analysis.cost import ExpectedCost, expected_cost
from stochastic_depth.report.sources import Trained
from stochastic_depth.report.style import CONSTANT, STOCHASTIC
from stochastic_depth.train import Config, SurvivalConfig

NETWORKS = {"cifar-resnet": "ResNet", "imagenet-resnet": "ResNet", "densenet": "DenseNet"}
DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN", "imagenet": "ImageNet"}


@dataclass(frozen=True)
class Series:
    """The seeds of one kind of training."""

    name: str
    colour: str
    survival: SurvivalConfig
    runs: tuple[Trained, ...]
    """At least one, each with at least one record."""

    @property
    def constant(self) -> bool:
        return self.survival.rule == "constant"

    @property
    def cost(self) -> ExpectedCost:
        """Of stochastic depth."""
        run = self.runs[0].run
        return expected_cost(run.config.model, self.survival, run.shape, len(run.classes))


@dataclass(frozen=True)
class Experiment:
    """One network on one data set with one schedule; constant depth comes first."""

    title: str
    series: tuple[Series, ...]

    @property
    def config(self) -> Config:
        """Of one of its runs; they differ in survival, seed and where they ran."""
        return self.series[0].runs[0].run.config

    @property
    def runs(self) -> Iterator[Trained]:
        for series in self.series:
            yield from series.runs

    @property
    def constant(self) -> Series | None:
        return next((series for series in self.series if series.constant), None)

    @property
    def stochastic(self) -> tuple[Series, ...]:
        return tuple(series for series in self.series if not series.constant)

    @property
    def main(self) -> Series:
        """What a headline tells: stochastic depth as in the paper, or what is nearest to it."""
        if not self.stochastic:
            return self.series[0]
        return min(
            self.stochastic,
            key=lambda s: (s.survival.rule != "linear", abs(s.survival.final - 0.5)),
        )

    @property
    def drops(self) -> tuple[float, ...]:
        """The epochs at which the learning rate is divided."""
        config = self.config
        return tuple(config.epochs * fraction for fraction in config.optimizer.milestones)

    def settled(self) -> "Experiment":
        """What may be compared now: finished runs where every kind has one, else equal epochs."""
        if all(any(run.finished for run in series.runs) for series in self.series):
            return self._of(lambda run: run if run.finished else None)
        reached = min(run.records[-1].epoch for run in self.runs)
        return self._of(
            lambda run: replace(run, records=tuple(r for r in run.records if r.epoch <= reached))
        )

    def _of(self, chosen) -> "Experiment":
        series = (
            replace(one, runs=tuple(run for run in map(chosen, one.runs) if run))
            for one in self.series
        )
        return replace(self, series=tuple(series))


def experiments(runs: Sequence[Trained]) -> list[Experiment]:
    """`runs` that have begun to be measured, put together."""
    measured = [run for run in runs if run.records]
    alike: dict[Config, list[Trained]] = {}
    for run in measured:
        alike.setdefault(_setting(run.run.config), []).append(run)
    found: list[Experiment] = []
    for setting, members in alike.items():
        title, number = describe(setting), sum(e.title.startswith(describe(setting)) for e in found)
        found.append(Experiment(f"{title} ({number + 1})" if number else title, _series(members)))
    return found


def _setting(config: Config) -> Config:
    """`config` without what is compared, and without what does not change a result."""
    data = replace(config.data, root=None, workers=0, download=False)
    survival = SurvivalConfig(rule="constant")
    return replace(config, recipe="", data=data, survival=survival, seed=0, keep=1)


def describe(config: Config) -> str:
    """Network, data and schedule."""
    return f"{NETWORKS[config.model.kind]}-{config.model.depth} on {describe_data(config)}"


def describe_data(config: Config) -> str:
    """Data and schedule."""
    data = DATA.get(config.data.name, config.data.name)
    if config.data.train is not None:
        data += f" ({config.data.train:,} images)"
    return f"{data}, {config.epochs} epoch{'s' * (config.epochs != 1)}"


def _series(runs: list[Trained]) -> tuple[Series, ...]:
    def survival(run: Trained) -> SurvivalConfig:
        chosen = run.run.config.survival
        return SurvivalConfig(rule="constant") if chosen.rule == "constant" else chosen

    def order(run: Trained) -> tuple:
        chosen = survival(run)
        return chosen.rule != "constant", chosen.rule, -chosen.final, str(chosen), run.name

    groups = [(s, tuple(g)) for s, g in groupby(sorted(runs, key=order), survival)]
    stochastic = [s for s, _ in groups if s.rule != "constant"]
    names = dict(zip(stochastic, _names(stochastic), strict=True))
    colours = {s: STOCHASTIC[n % len(STOCHASTIC)] for n, s in enumerate(stochastic)}
    return tuple(
        Series(names.get(s, "constant depth"), colours.get(s, CONSTANT), s, members)
        for s, members in groups
    )


def _names(stochastic: list[SurvivalConfig]) -> list[str]:
    """Of each, what sets it apart."""
    if len(stochastic) == 1:
        return ["stochastic depth"]
    values = [asdict(survival) for survival in stochastic]
    apart = [k for k in values[0] if len({str(value[k]) for value in values}) > 1]
    more = [k for k in apart if k not in ("rule", "final")]
    rules = {"linear": "linear decay to", "uniform": "uniform"}
    return [
        ", ".join(
            [f"{rules[v['rule']]} {v['final']:g}", *(f"{k.replace('_', ' ')} {v[k]}" for k in more)]
        )
        for v in values
    ]
