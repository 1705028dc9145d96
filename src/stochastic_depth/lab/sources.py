"""The data that the laboratory reads: run folders, folders of them, sweeps and benchmarks.

The results of analyses are written here too, into the folder of their run.
"""

import json
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from stochastic_depth.choices import CheckpointName
from stochastic_depth.data import Batches
from stochastic_depth.errors import RunError
from stochastic_depth.files import (
    LARGE,
    SMALL,
    is_there,
    make_folder,
    read_file,
    reason,
    write_whole,
)
from stochastic_depth.handle import Handle
from stochastic_depth.lab.sweep.folder import Sweep, read_sweep
from stochastic_depth.train import Record, Run, layout, open_run, reopen, trained_model
from stochastic_depth.train.build import handle_or_always_open
from stochastic_depth.train.run_folder import checksum
from stochastic_depth.train.weights import require_weights_of

FORMAT = 1
"""The format number of the files of an analysis."""

AnalysisName = Literal["ensemble", "pruning"]


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
    def ended(self) -> bool:
        return self.finished or self.failed

    @cached_property
    def described(self) -> dict[str, Any]:
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

    @property
    def size(self) -> int:
        """How many points the grid has, each of which will be a run."""
        return len(self.sweep.grid.points())

    def finished(self) -> list[RecordedRun]:
        """The runs that figures show."""
        return [run for run in self.runs if run.finished and run.records]

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
            raise RunError(
                f"{path} holds no run: give run folders, folders of runs, sweep folders, or files "
                "that bench depth wrote with --out"
            )
        for folder in here:
            if _is_sweep(folder):
                sweeps[folder.resolve()] = _sweep(folder)
            else:
                runs[folder.resolve()] = read_run(folder)
    return Sources(tuple(runs.values()), tuple(sweeps.values()), tuple(benchmarks.values()))


def read_run(path: Path) -> RecordedRun:
    """The content of a run folder at this moment.

    Raises:
        RunError: when it is not a run folder, or has the weights of another run.
    """
    run = open_run(path)
    require_weights_of(run.id, run.weights)
    finished = is_there(run.weights)  # looked up before the journal, which may still grow
    return RecordedRun(run, tuple(run.records()), finished)


def state_of(paths: Iterable[Path]) -> dict[Path, tuple[int, int] | None]:
    """Size and time of each file that `read_sources` may read; None for those that do not exist.

    It changes when a run goes on or ends, when another one begins, and when an analysis ends. Not
    when anything else is written into one of the folders, such as the page itself.
    """
    files: list[Path] = []
    for path in paths:
        known = _known_in(path)
        runs = [run for folder in known for run in _runs_of(folder)]
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
    images: Batches
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
    run, images = reopen(path, data, device)
    model, step = trained_model(run, images, which)
    return TrainedNetwork(run, images, model, handle_or_always_open(model), step)


def analysis_path(run: Run, name: AnalysisName) -> Path:
    """The path of the result of the analysis `name` of a run."""
    return run.path / layout.ANALYSIS / f"{name}.json"


def write_analysis(run: Run, name: AnalysisName, found: dict[str, Any]) -> None:
    """Write the result of an analysis, with the identity of the run and a checksum.

    Raises:
        RunError: when it cannot be written.
    """
    path = analysis_path(run, name)
    content = {"format": FORMAT, "run": run.id, **found}
    content["sha256"] = checksum(content)
    try:
        make_folder(path.parent)
    except OSError as error:
        raise RunError(f"{path.parent} cannot be made: {reason(error)}") from error
    write_whole(path, json.dumps(content, indent=1).encode() + b"\n", inside=run.path)


def read_analysis(run: Run, name: AnalysisName) -> dict[str, Any]:
    """The result of an analysis as `write_analysis` wrote it.

    Raises:
        RunError: when it cannot be read, has no checksum or another one, is of another run, or has
            an unknown format.
    """
    path = analysis_path(run, name)
    remedy = f"remove it, and measure again by stochastic-depth analyze {name} {run.path}"
    try:
        content = read_json(path, inside=run.path)
    except RunError as error:
        raise RunError(f"{error}; {remedy}") from error
    if "sha256" not in content:
        raise RunError(f"{path} has no checksum, as an earlier version left it: {remedy}")
    if content.pop("sha256") != checksum(content):
        raise RunError(f"{path} is damaged or was edited, its checksum does not match: {remedy}")
    if content.get("run") != run.id:
        raise RunError(f"{path} is of another run: {remedy}")
    if content.get("format") != FORMAT:
        raise RunError(
            f"{path} has format {content.get('format')}, this version reads {FORMAT}: use the "
            "version that wrote it"
        )
    return content


def same_analysis(run: Run, name: AnalysisName, settings: dict[str, Any]) -> dict[str, Any] | None:
    """An earlier result of an analysis with the same `settings`; None if there is no valid one."""
    try:
        found = read_analysis(run, name)
    except RunError:
        return None
    return found if settings.items() <= found.items() else None


def _sweep(path: Path) -> RecordedSweep:
    return RecordedSweep(read_sweep(path), tuple(map(read_run, _runs_of(path))))


def _benchmark(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not {"depths", "seconds_per_image", "bytes_per_image", "lines"} <= content.keys():
        raise RunError(
            f"{path} is not what bench depth writes: stochastic-depth bench depth --out FILE does"
        )
    return content


def read_json(path: Path, inside: Path | None = None) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        inside: as for `read_file`.

    Raises:
        RunError: when it cannot be read, or holds something else.
    """
    try:
        content = json.loads(read_file(path, LARGE, inside))
    except OSError as error:
        raise RunError(f"{path} cannot be read: {reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} cannot be understood: it holds no object")
    return content


def _folders(path: Path) -> Iterator[Path]:
    return (entry for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else iter(())


def _known_in(path: Path) -> list[Path]:
    """`path`, if it is a run or a sweep; otherwise those in it."""
    return [path] if _is_known(path) else sorted(filter(_is_known, _folders(path)))


def _runs_of(sweep: Path) -> list[Path]:
    return sorted(filter(_is_run, _folders(sweep / "runs")))


def _is_known(path: Path) -> bool:
    return _is_run(path) or _is_sweep(path)


def _is_run(path: Path) -> bool:
    return is_there(path / layout.CONFIG)


def _is_sweep(path: Path) -> bool:
    return is_there(path / "sweep.json")
