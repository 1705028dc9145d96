"""Stochastic against constant depth: the same network, data, seeds and machine, epoch by epoch."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from stochastic_depth.analysis.cost import expected_cost
from stochastic_depth.errors import ConfigError, RunError
from stochastic_depth.recipes import constant_depth
from stochastic_depth.train import Config, Run, begin, best_record, fit, open_run, reopen
from stochastic_depth.train.display import Display
from stochastic_depth.train.files import write_whole

KINDS = ("constant", "stochastic")


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds (None: there is one)."""

    mean: float
    deviation: float | None

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return Spread(statistics.fmean(values), deviation)


@dataclass(frozen=True)
class Outcome:
    """What one kind of training came to over its seeds."""

    test_error_best: Spread
    """Percent, at the epoch of the best validation error."""
    test_error_last: Spread
    """Percent, after the last epoch."""
    seconds: Spread
    """Of training, without evaluation."""
    active_blocks: Spread
    """Mean over the steps of a run."""


@dataclass(frozen=True)
class Comparison:
    """Constant and stochastic depth side by side."""

    constant: Outcome
    stochastic: Outcome
    blocks: int
    expected_active_blocks: float
    saving_measured: float
    """1 - (median seconds an epoch, stochastic) / (the same, constant)."""
    saving_expected: float
    """The share of the training FLOPs in dropped blocks."""


def train_pairs(
    config: Config,
    seeds: Sequence[int],
    folder: Path,
    display: Display,
    stop: Callable[[], int | None],
) -> dict[str, list[Run]]:
    """Train `config` and its constant-depth twin for each seed; the two take turns by the epoch.

    So whatever the machine does besides, it does to both. Runs that are finished are kept as they
    are, interrupted ones go on.

    Raises:
        ConfigError: when `config` is constant depth itself.
        RunError: when `folder` holds runs of another configuration.
    """
    if config.survival.rule == "constant":
        raise ConfigError(f"{config.recipe} has constant depth already: compare a stochastic one")
    runs: dict[str, list[Run]] = {kind: [] for kind in KINDS}
    for seed in seeds:
        turns = []
        for kind, chosen in zip(KINDS, (constant_depth(config), config), strict=True):
            path = folder / f"{kind}-seed{seed}"
            run, records = _start(replace(chosen, seed=seed), path, display, stop)
            runs[kind].append(run)
            turns.append(records)
        for _ in zip_longest(*turns):
            pass
    return runs


def _start(
    config: Config, path: Path, display: Display, stop: Callable[[], int | None]
) -> tuple[Run, Iterator[Any]]:
    if not path.exists():
        run, images = begin(config, path)
    else:
        run = open_run(path)
        if what_matters(run.config) != what_matters(config):
            raise RunError(f"{path} has another configuration: choose another --out")
        if run.weights.exists():
            return run, iter(())
        run, images = reopen(path, config.data.root)
    watch = display.watch(path.name)

    def records() -> Iterator[Any]:
        yield from fit(run, images, watch, stop)
        display.finish(watch)

    return run, records()


def what_matters(config: Config) -> Config:
    """`config` without what does not change its result."""
    return replace(config, keep=1, data=replace(config.data, root=None, workers=0, download=False))


def compare(runs: dict[str, list[Run]]) -> Comparison:
    """Read the journals of finished runs."""
    run = runs["stochastic"][0]
    cost = expected_cost(run.config.model, run.config.survival, run.shape, len(run.classes))
    epoch_seconds = {
        kind: statistics.median(r.seconds for run in runs[kind] for r in run.records())
        for kind in KINDS
    }
    return Comparison(
        constant=_outcome(runs["constant"]),
        stochastic=_outcome(runs["stochastic"]),
        blocks=len(cost.survival),
        expected_active_blocks=sum(cost.survival),
        saving_measured=1 - epoch_seconds["stochastic"] / epoch_seconds["constant"],
        saving_expected=cost.saving,
    )


def _outcome(runs: list[Run]) -> Outcome:
    journals = [run.records() for run in runs]
    return Outcome(
        Spread.of([best_record(records).test_error for records in journals]),
        Spread.of([records[-1].test_error for records in journals]),
        Spread.of([sum(record.seconds for record in records) for records in journals]),
        Spread.of([statistics.fmean(r.active_blocks for r in records) for records in journals]),
    )


def write_comparison(path: Path, comparison: Comparison, runs: dict[str, list[Run]]) -> None:
    """The figures, the curves behind them and where they were measured, as JSON."""
    described = json.loads((runs["stochastic"][0].path / "config.json").read_text())
    content = {
        "comparison": dataclasses.asdict(comparison),
        "config": what_matters(runs["stochastic"][0].config).to_json(),
        **{k: described[k] for k in ("execution", "versions", "git_commit", "machine", "created")},
        "curves": {
            kind: [[dataclasses.asdict(record) for record in run.records()] for run in runs[kind]]
            for kind in KINDS
        },
    }
    write_whole(path, json.dumps(content, indent=1).encode() + b"\n")
