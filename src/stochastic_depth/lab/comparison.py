"""Compare stochastic with constant depth: same network, data, seeds and machine, in turns.

`measure_pace` takes a few training steps first, to choose how many epochs fit into a given time.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, zip_longest
from pathlib import Path

import torch
from rich.table import Table

from stochastic_depth.errors import ConfigError, RunError
from stochastic_depth.files import SMALL, is_there, read_file, write_whole
from stochastic_depth.lab.drawing import file_png
from stochastic_depth.lab.formatting import plus_minus
from stochastic_depth.lab.outcomes import Outcome, expected_cost, experiments
from stochastic_depth.lab.sources import read_run
from stochastic_depth.lab.training_curves import training_curves, training_time
from stochastic_depth.recipes import constant_depth
from stochastic_depth.train import Config, Run, begin, fit, open_run, reopen
from stochastic_depth.train.display import Display
from stochastic_depth.train.journal import Record
from stochastic_depth.train.open import open_batches
from stochastic_depth.train.run_folder import remove_untrained_on_error
from stochastic_depth.train.runtime import resolve_runtime
from stochastic_depth.train.train_state import TrainState

KINDS = ("constant", "stochastic")


@dataclass(frozen=True)
class Comparison:
    """Constant and stochastic depth side by side."""

    constant: Outcome
    stochastic: Outcome
    blocks: int
    expected_active_blocks: float
    saving_measured: float
    """1 - (median seconds of an epoch with stochastic depth) / (the same with constant depth)."""
    saving_expected: float
    """The share of the training FLOPs that is saved in dropped blocks."""


def train_pairs(
    config: Config,
    seeds: Sequence[int],
    folder: Path,
    display: Display,
    stop: Callable[[], int | None],
    end: float | None = None,
) -> dict[str, list[Run]]:
    """Train `config` and its twin of constant depth for each seed, in turns by the epoch.

    Other load on the machine then affects both. Finished runs are kept, interrupted ones are
    resumed.

    Args:
        end: a time of `time.monotonic`. Before a turn that would end later, the current runs are
            interrupted; another call resumes them. At least one turn is taken. Unfinished runs of a
            later seed are not returned.

    Raises:
        ConfigError: when `config` itself has constant depth.
        RunError: when `folder` contains runs of another configuration.
    """
    if config.survival.rule == "constant":
        raise ConfigError(f"{config.recipe} has constant depth already: compare a stochastic one")
    runs: dict[str, list[Run]] = {kind: [] for kind in KINDS}
    a_pair = 0.0
    for seed in seeds:
        begun = (folder / f"{KINDS[0]}-seed{seed}").exists()
        if end is not None and runs[KINDS[0]] and not begun and time.monotonic() + a_pair > end:
            break
        began = time.monotonic()
        pair, turns = [], []
        with remove_untrained_on_error(pair):
            for kind, chosen in zip(KINDS, (constant_depth(config), config), strict=True):
                path = folder / f"{kind}-seed{seed}"
                run, records = _start(replace(chosen, seed=seed), path, display, stop)
                pair.append(run)
                turns.append(records)
            finished = _take_turns(turns, config.epochs, end)
        if finished or not runs[KINDS[0]]:
            for kind, run in zip(KINDS, pair, strict=True):
                runs[kind].append(run)
        if not finished:
            break
        a_pair = max(a_pair, time.monotonic() - began)
    return runs


def _take_turns(turns: Sequence[Generator[Record]], epochs: int, end: float | None) -> bool:
    """Train one epoch of each in turn to the last; False if another turn would end after `end`."""
    longest, began = 0.0, time.monotonic()
    for records in zip_longest(*turns):
        longest, began = max(longest, time.monotonic() - began), time.monotonic()
        epoch = max(record.epoch for record in records if record is not None)
        if end is not None and epoch < epochs and began + longest > end:
            for turn in turns:
                turn.close()
            return False
    return True


def _start(
    config: Config, path: Path, display: Display, stop: Callable[[], int | None]
) -> tuple[Run, Generator[Record]]:
    images = None
    if not is_there(path):
        run, images = begin(config, path)
    else:
        run = open_run(path)
        if run.config.without_io() != config.without_io():
            raise RunError(f"{path} has another configuration: choose another --out")
        if not is_there(run.weights):
            run, images = reopen(path, config.data.root)

    def records() -> Generator[Record]:
        if images is not None:
            view = display.show(path.name)
            yield from fit(run, images, view, stop)
            display.finish(view)

    return run, records()


def records_of_all(runs: dict[str, list[Run]]) -> dict[str, list[list[Record]]]:
    """The journals of each kind, up to the epoch that all runs have reached."""
    journals = {kind: [run.records() for run in of_kind] for kind, of_kind in runs.items()}
    common = min(len(records) for of_kind in journals.values() for records in of_kind)
    return {kind: [records[:common] for records in of] for kind, of in journals.items()}


def compare(runs: dict[str, list[Run]]) -> Comparison:
    """Compare the runs by their journals, up to the epoch that all of them have reached."""
    run = runs["stochastic"][0]
    journals = records_of_all(runs)
    last = journals["stochastic"][0][-1]
    epoch = round(last.step / last.epoch)
    cost = expected_cost(run.config, run.shape, len(run.classes), epoch, last.step)
    scheduled = run.config.survival.schedule.kind != "none"
    typical = statistics.fmean if scheduled else statistics.median
    epoch_seconds = {
        kind: typical([r.seconds for records in journals[kind] for r in records]) for kind in KINDS
    }
    return Comparison(
        constant=Outcome.of(journals["constant"]),
        stochastic=Outcome.of(journals["stochastic"]),
        blocks=len(cost.survival),
        expected_active_blocks=sum(cost.survival),
        saving_measured=1 - epoch_seconds["stochastic"] / epoch_seconds["constant"],
        saving_expected=cost.saving,
    )


def write_comparison(path: Path, comparison: Comparison, runs: dict[str, list[Run]]) -> None:
    """Write the results, the curves behind them and where they were measured, as JSON."""
    described = json.loads(read_file(runs["stochastic"][0].path / "config.json", SMALL))
    content = {
        "comparison": dataclasses.asdict(comparison),
        "config": runs["stochastic"][0].config.without_io().to_json(),
        **{k: described[k] for k in ("execution", "versions", "git_commit", "machine", "created")},
        "curves": {
            kind: [[dataclasses.asdict(record) for record in run.records()] for run in runs[kind]]
            for kind in KINDS
        },
    }
    write_whole(path, json.dumps(content, indent=1).encode() + b"\n")


def comparison_table(title: str, comparison: Comparison, seeds: int) -> Table:
    """Constant and stochastic depth, in a column each."""
    constant, stochastic = comparison.constant, comparison.stochastic
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("1 seed" if seeds == 1 else f"mean ± deviation, {seeds} seeds")
    table.add_column("constant", justify="right")
    table.add_column("stochastic", justify="right")
    for name, unit, a, b in (
        ("test error, best validation", "%", constant.test_error_best, stochastic.test_error_best),
        ("test error, last epoch", "%", constant.test_error_last, stochastic.test_error_last),
        ("seconds of training", "s", constant.seconds, stochastic.seconds),
        ("active blocks", "", constant.active_blocks, stochastic.active_blocks),
    ):
        table.add_row(name, f"{plus_minus(a)} {unit}".rstrip(), f"{plus_minus(b)} {unit}".rstrip())
    table.add_row(
        "active blocks, expected", f"{comparison.blocks}", f"{comparison.expected_active_blocks:g}"
    )
    table.add_section()
    table.add_row("training time saved, measured", "", f"{100 * comparison.saving_measured:.1f} %")
    table.add_row("FLOPs saved, expected", "", f"{100 * comparison.saving_expected:.1f} %")
    return table


def comparison_picture(title: str, runs: dict[str, list[Run]]) -> bytes:
    """Training loss, test error and the seconds of an epoch, as PNG."""
    recorded = [read_run(run.path) for of_kind in runs.values() for run in of_kind]
    (experiment,) = experiments(recorded)
    return file_png(title, training_curves(experiment), training_time(experiment))


FEWEST_EPOCHS = 3
"""The fewest epochs of a comparison; with fewer nothing can be seen."""
SECONDS_AT_END = 10.0
"""How many seconds are reserved for the last checkpoint and the table."""
SLOWER_THAN_MEASURED = 2.0
"""How much longer an epoch is assumed to take than its measured steps, because of evaluations,
checkpoints and other load."""


@dataclass(frozen=True)
class Pace:
    """How long a training step of constant depth takes on this machine."""

    seconds: dict[int, float]
    """Seconds of a step, by the number of threads."""
    steps_per_epoch: int
    saving: float
    """The share of a step that stochastic depth is expected to save."""

    @property
    def threads(self) -> int:
        """The number of threads with the shortest step."""
        return min(self.seconds, key=lambda threads: self.seconds[threads])

    @property
    def epoch(self) -> float:
        """Seconds of an epoch of both networks together."""
        step = self.seconds[self.threads] * (2 - self.saving)
        return step * self.steps_per_epoch * SLOWER_THAN_MEASURED

    def epochs_in(self, seconds: float, wanted: int) -> int:
        """How many epochs of both networks fit into `seconds`, from `FEWEST_EPOCHS` to `wanted`."""
        return max(min(FEWEST_EPOCHS, wanted), min(wanted, int(seconds / self.epoch)))

    def described(self) -> str:
        """A sentence: the time of a step with each number of threads, and the chosen one."""
        of_each = ", ".join(
            f"{seconds:.2f} s with {threads} thread{'s' if threads > 1 else ''}"
            for threads, seconds in sorted(self.seconds.items())
        )
        return f"a step takes {of_each}: taking {self.threads}"


def measure_pace(config: Config, patience: float = 10.0) -> Pace:
    """Take a few training steps with one thread and with all, and keep the better number.

    Args:
        patience: seconds after which no further steps are taken.
    """
    constant = constant_depth(config)
    runtime = resolve_runtime(constant)
    batches = open_batches(constant, runtime)
    train_state = TrainState(constant, runtime, batches)
    cost = expected_cost(config, batches.shape, len(batches.classes), batches.steps_per_epoch)
    mini_batches = cycle([next(iter(batches.train(0)))])
    everything = torch.get_num_threads()
    choices = [1, everything] if everything > 1 and runtime.device == "cpu" else [everything]
    timed: dict[int, list[float]] = {threads: [] for threads in choices}
    began = time.monotonic()
    for _ in range(4):
        for threads in choices:
            torch.set_num_threads(threads)
            start = time.perf_counter()
            train_state.advance(*next(mini_batches))
            runtime.synchronise()
            timed[threads].append(time.perf_counter() - start)
        best = min(min(of_n) for of_n in timed.values())
        choices = [threads for threads in choices if min(timed[threads]) < 2 * best]
        if time.monotonic() - began > patience:
            break
    # The first step of each also allocates and compiles.
    seconds = {n: statistics.median(of_n[1:] or of_n) for n, of_n in timed.items()}
    pace = Pace(seconds, batches.steps_per_epoch, cost.saving)
    torch.set_num_threads(pace.threads)
    return pace


def epochs_of(folder: Path, config: Config, seeds: Sequence[int]) -> int | None:
    """The epochs of the runs of a comparison in `folder`; None if it has no runs."""
    for seed in seeds:
        path = folder / f"constant-seed{seed}"
        if path.exists():
            found = open_run(path).config
            same = replace(constant_depth(config), seed=seed, epochs=found.epochs)
            if found.without_io() == same.without_io():
                return found.epochs
    return None
