"""Compare stochastic with constant depth: same network, data, seeds and machine, in turns."""

import json
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path

import torch

from stochastic_depth.errors import RunError
from stochastic_depth.files import is_there, write_whole
from stochastic_depth.lab.drawing import file_png
from stochastic_depth.lab.experiments import Experiment, experiments
from stochastic_depth.lab.recorded import read_run
from stochastic_depth.lab.training_curves import training_curves, training_time
from stochastic_depth.plain_text import count_text, epoch_text
from stochastic_depth.recipes import constant_depth
from stochastic_depth.train import Config, Run, begin, fit, open_run, reopen
from stochastic_depth.train.display import Display
from stochastic_depth.train.engine_choice import on_one_engine
from stochastic_depth.train.journal import Record
from stochastic_depth.train.run_folder import common_fingerprint, remove_untrained_on_error

KINDS = ("constant", "stochastic")


def twins(config: Config) -> list[Config]:
    """Constant depth and `config`, which are trained by one engine."""
    return on_one_engine([constant_depth(config), config])


def train_pairs(
    config: Config,
    seeds: Sequence[int],
    folder: Path,
    display: Display,
    stop: Callable[[], int | None],
    end: float = math.inf,
) -> dict[str, list[Run]]:
    """Train `config` and its twin of constant depth for each seed, in turns by the epoch.

    Other load on the machine then affects both. Finished runs are kept, interrupted ones are
    resumed, all with the number of threads that the first one began with.

    Args:
        end: a time of `time.monotonic`. Before a turn that would end later, the current runs are
            interrupted; another call resumes them. At least one turn is taken. Unfinished runs of a
            later seed are not returned.

    Raises:
        RunError: when `folder` contains runs of another configuration or on other data, or a
            finished one that has lost a part of its journal.
    """
    runs: dict[str, list[Run]] = {kind: [] for kind in KINDS}
    begun = runs_in(folder, seeds)
    fingerprint = common_fingerprint(begun)
    if begun:
        torch.set_num_threads(begun[0].runtime.threads)  # sums are rounded as before
    longest = 0.0
    for seed in seeds:
        began = time.monotonic()
        if runs[KINDS[0]] and began + longest > end:
            break
        pair, turns = [], []
        with remove_untrained_on_error(pair):
            for kind, chosen in zip(KINDS, twins(config), strict=True):
                path = folder / f"{kind}-seed{seed}"
                chosen = replace(chosen, seed=seed)
                run, records = _start(chosen, path, fingerprint, display, stop)
                fingerprint = run.fingerprint
                pair.append(run)
                turns.append(records)
            finished = _take_turns(turns, config.epochs, end)
        if finished or not runs[KINDS[0]]:
            for kind, run in zip(KINDS, pair, strict=True):
                runs[kind].append(run)
        if not finished:
            break
        longest = max(longest, time.monotonic() - began)
    return runs


def runs_in(folder: Path, seeds: Sequence[int]) -> list[Run]:
    """The runs of a comparison that have begun in `folder`."""
    paths = (folder / f"{kind}-seed{seed}" for seed in seeds for kind in KINDS)
    return [open_run(path) for path in paths if is_there(path)]


def _take_turns(turns: Sequence[Generator[Record]], epochs: int, end: float) -> bool:
    """Train one epoch of each in turn to the last; False if another turn would end after `end`."""
    longest, began = 0.0, time.monotonic()
    for records in zip_longest(*turns):
        longest, began = max(longest, time.monotonic() - began), time.monotonic()
        epoch = max(record.epoch for record in records if record is not None)
        if epoch < epochs and began + longest > end:
            for turn in turns:
                turn.close()
            return False
    return True


def _start(
    config: Config,
    path: Path,
    fingerprint: str | None,
    display: Display,
    stop: Callable[[], int | None],
) -> tuple[Run, Generator[Record]]:
    batches = None
    if not is_there(path):
        run, batches = begin(config, path, fingerprint)
    else:
        run = open_run(path)
        if run.config.without_io() != config.without_io():
            raise RunError(f"{path} has another configuration: choose another --out")
        if not run.is_finished():
            run, batches = reopen(path, config.data.root)

    def records() -> Generator[Record]:
        if batches is not None:
            view = display.show(path.name)
            yield from fit(run, batches, view, stop)
            display.finish(view)

    return run, records()


def compare_runs(runs: dict[str, list[Run]]) -> Experiment:
    """Constant depth and stochastic depth, up to the last epoch that both have reached."""
    return _recorded(runs).comparable()


def _recorded(runs: dict[str, list[Run]]) -> Experiment:
    (experiment,) = experiments(
        [read_run(run.path) for of_kind in runs.values() for run in of_kind]
    )
    return experiment


def remarks(experiment: Experiment, epochs: int, seeds: int) -> Iterator[str]:
    """What to know about a comparison that was not trained in full.

    Args:
        epochs: how many epochs were asked for; the runs may have been begun with fewer.
        seeds: how many seeds were to be trained.
    """
    trained = experiment.series[0].runs
    reached, planned = trained[0].records[-1].epoch, experiment.config.epochs
    if reached < epochs / 2:
        yield (
            f"{epoch_text(reached)} of {count_text(epochs, 'epoch')} are too few to compare errors "
            "by: look at the seconds and the active blocks"
        )
    if reached < planned or len(trained) < seeds:
        done = f"{epoch_text(reached)} of {count_text(planned, 'epoch')}"
        if reached >= planned:
            done = f"{len(trained)} of {seeds} seeds"
        yield f"stopped after {done}, to end in time: the same command again resumes it"


def write_comparison(
    folder: Path, experiment: Experiment, runs: dict[str, list[Run]]
) -> tuple[Path, Path]:
    """Write `comparison.png` and `comparison.json` into `folder`; returns their paths.

    The picture has the training loss, the test error and the seconds of an epoch. The JSON has the
    results, the curves behind them, and where they were measured.
    """
    picture, results = folder / "comparison.png", _recorded(runs)
    title = ", ".join(filter(None, (results.title, results.progress)))
    write_whole(picture, file_png(title, training_curves(results), training_time(results)))
    write_whole(folder / "comparison.json", _to_json(experiment, runs))
    return picture, folder / "comparison.json"


def _to_json(experiment: Experiment, runs: dict[str, list[Run]]) -> bytes:
    constant, stochastic = experiment.series
    cost = stochastic.cost
    description = stochastic.runs[0].description
    content = {
        "comparison": {
            "constant": asdict(constant.outcome),
            "stochastic": asdict(stochastic.outcome),
            "blocks": len(cost.survival),
            "expected_active_blocks": stochastic.expected_active_blocks,
            "saving_measured": experiment.time_saved(stochastic),
            "saving_expected": cost.saving,
        },
        "config": stochastic.runs[0].run.config.without_io().to_json(),
        **{k: description[k] for k in ("runtime", "versions", "git_commit", "machine", "created")},
        "curves": {
            kind: [[asdict(record) for record in run.records()] for run in runs[kind]]
            for kind in KINDS
        },
    }
    return json.dumps(content, indent=1).encode() + b"\n"
