"""What the laboratory reads: run folders, folders of them, sweeps and benchmarks."""

import json
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from torch import nn

from stochastic_depth.choices import CheckpointName
from stochastic_depth.data import Batches
from stochastic_depth.errors import RunError
from stochastic_depth.files import SMALL, UNFINISHED, is_there, read_file
from stochastic_depth.handle import Handle
from stochastic_depth.lab.analyses import (
    AnalysisName,
    analysis_path,
    read_analysis,
    read_json,
)
from stochastic_depth.lab.sweep.folder import Sweep, read_sweep
from stochastic_depth.train import Record, Run, layout, open_run, reopen, trained_model
from stochastic_depth.train.build import handle_or_always_open
from stochastic_depth.train.failures import failure_of
from stochastic_depth.train.weights import require_weights_of

EXPECTED = (
    "give run folders, folders of runs, sweep folders, or files that bench depth wrote with --out"
)


@dataclass(frozen=True)
class RecordedRun:
    """The content of a run folder at one moment; the run may be finished or still training."""

    run: Run
    records: tuple[Record, ...]
    finished: bool

    @property
    def name(self) -> str:
        return self.run.path.name

    @property
    def failed(self) -> bool:
        """Whether its sweep has recorded that it cannot be trained."""
        return is_there(self.run.path / layout.FAILED)

    @property
    def failure(self) -> str | None:
        """The recorded reason why it cannot be trained, or None."""
        return failure_of(self.run.path)

    @property
    def ended(self) -> bool:
        return self.finished or self.failed

    @cached_property
    def description(self) -> dict[str, Any]:
        """The machine, the versions, the commit and all other fields of `config.json`."""
        return json.loads(read_file(self.run.path / layout.CONFIG, SMALL))

    def analysis(self, name: AnalysisName) -> dict[str, Any] | None:
        """The result of `stochastic-depth analyze`; None if it was not run.

        Raises:
            RunError: as `read_analysis`.
        """
        return read_analysis(self.run, name) if is_there(analysis_path(self.run, name)) else None


@dataclass(frozen=True)
class RecordedSweep:
    """A sweep and the content of its run folders at one moment."""

    sweep: Sweep
    runs: tuple[RecordedRun, ...]
    """The runs of points of its grid that have begun."""
    others: tuple[str, ...] = ()
    """The names of folders among the runs that are of no point, such as copies; they are not
    read."""

    @property
    def size(self) -> int:
        """How many points the grid has, each of which will be a run."""
        return len(self.sweep.grid.points())

    def finished(self) -> list[RecordedRun]:
        """The runs that figures show."""
        return [run for run in self.runs if run.finished]

    @property
    def under_way(self) -> bool:
        return sum(run.ended for run in self.runs) < self.size


@dataclass(frozen=True)
class Sources:
    """Everything that one report shows."""

    runs: tuple[RecordedRun, ...]
    sweeps: tuple[RecordedSweep, ...]
    benchmarks: tuple[dict[str, Any], ...]
    """Results that `bench depth --out` wrote."""

    @property
    def under_way(self) -> bool:
        """Whether any run or sweep has not ended."""
        going = any(not run.ended for run in self.runs)
        return going or any(sweep.under_way for sweep in self.sweeps)

    def all_runs(self) -> Iterator[RecordedRun]:
        """All runs, including those of sweeps."""
        yield from self.runs
        for sweep in self.sweeps:
            yield from sweep.runs


def read_sources(paths: Sequence[Path]) -> Sources:
    """Read everything that `paths` name, as it is at this moment.

    Args:
        paths: run folders, sweep folders, folders of those, or JSON files of `bench depth`.

    Raises:
        RunError: when one of them is something else, or cannot be understood.
    """
    runs: dict[Path, RecordedRun] = {}
    sweeps: dict[Path, RecordedSweep] = {}
    benchmarks: dict[Path, dict[str, Any]] = {}
    for path in paths:
        if path.is_file():
            benchmarks[path.resolve()] = _benchmark(path)
            continue
        here = _known_in(path)
        if not here:
            raise RunError(f"{path} holds no run: {EXPECTED}")
        for folder in here:
            if _is_sweep(folder):
                sweeps[folder.resolve()] = _sweep(folder)
            else:
                runs[folder.resolve()] = read_run(folder)
    return Sources(tuple(runs.values()), tuple(sweeps.values()), tuple(benchmarks.values()))


def read_run(path: Path) -> RecordedRun:
    """The content of a run folder at this moment.

    Raises:
        RunError: when it is not a run folder, has the weights of another run, or is finished and
            has lost a part of its journal.
    """
    run = open_run(path)
    require_weights_of(run.id, run.weights)
    finished = run.is_finished()  # looked up before the records, which may still grow
    return RecordedRun(run, tuple(run.records()), finished)


def state_of(paths: Iterable[Path]) -> dict[Path, tuple[int, int] | None]:
    """Size and time of each file that `read_sources` may read; None for those that do not exist.

    It changes when a run is resumed or ends, when another one begins, and when an analysis ends;
    not when anything else is written into one of the folders, such as the page itself.
    """
    files: list[Path] = []
    for path in paths:
        known = _known_in(path)
        runs = [run for folder in known for run in _folders(folder / "runs")]
        files += [path] if path.is_file() else known
        for run in (*known, *runs):
            files += [run / name for name in (layout.JOURNAL, layout.WEIGHTS, layout.FAILED)]
            files += [run / layout.ANALYSIS / f"{name}.json" for name in get_args(AnalysisName)]
    return {file: _status(file) for file in files}


def _status(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


@dataclass(frozen=True)
class TrainedNetwork:
    """A trained network in evaluation mode, and its run."""

    run: Run
    batches: Batches
    model: nn.Module
    handle: Handle
    """The handle of the network. For a run of constant depth, p_l = 1 for every block."""
    step: int


def load_trained(
    path: Path,
    data: Path | None = None,
    which: CheckpointName = "best",
    device: str | None = None,
) -> TrainedNetwork:
    """Load the network of a run's checkpoint.

    Args:
        data, device: as for `reopen`.

    Raises:
        RunError, DataError, ConfigError: as for `reopen` and `trained_model`.
        ApplyError: when it has no residual blocks.
    """
    run, batches = reopen(path, data, device)
    model, step = trained_model(run, batches, which)
    return TrainedNetwork(run, batches, model, handle_or_always_open(model), step)


def _sweep(path: Path) -> RecordedSweep:
    sweep = read_sweep(path)
    points = {point.name: point for point in sweep.grid.points()}
    begun = [points[name] for name in sorted(points) if sweep.begun(points[name])]
    runs = tuple(read_run(sweep.path(point)) for point in begun)
    sweep.require_own(recorded.run for recorded in runs)
    others = sorted({folder.name for folder in _folders(path / "runs")} - points.keys())
    return RecordedSweep(sweep, runs, tuple(others))


def _benchmark(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except RunError as error:
        raise RunError(f"{error}; {EXPECTED}") from error
    if not {"depths", "seconds_per_image", "bytes_per_image", "lines"} <= content.keys():
        raise RunError(f"{path} is not what bench depth writes: {EXPECTED}")
    return content


def _folders(path: Path) -> Iterator[Path]:
    """The folders in `path`, without those that are just being written."""
    for entry in path.iterdir() if path.is_dir() else ():
        if entry.is_dir() and not entry.name.startswith(UNFINISHED):
            yield entry


def _known_in(path: Path) -> list[Path]:
    """`path`, if it is a run or a sweep; otherwise those in it."""
    return [path] if _is_known(path) else sorted(filter(_is_known, _folders(path)))


def _is_known(path: Path) -> bool:
    return _is_run(path) or _is_sweep(path)


def _is_run(path: Path) -> bool:
    return is_there(path / layout.CONFIG) or layout.has_lost_config(path)


def _is_sweep(path: Path) -> bool:
    return is_there(path / "sweep.json")
