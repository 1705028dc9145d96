"""A sweep: a grid of runs in one folder, with `sweep.json` and a run folder for each point."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from filelock import FileLock

from stochastic_depth.choices import SweepKind
from stochastic_depth.data import Batches
from stochastic_depth.errors import ConfigError, RunError
from stochastic_depth.files import (
    SMALL,
    UNFINISHED,
    is_there,
    make_folder,
    read_file,
    reason,
    require_writable,
    write_whole,
)
from stochastic_depth.lab.sweep.grid import Grid, Point
from stochastic_depth.train import Config, Record, Run, layout, open_run
from stochastic_depth.train.build import require_trainable
from stochastic_depth.train.engine_choice import on_one_engine
from stochastic_depth.train.failures import failure_of
from stochastic_depth.train.open import open_batches
from stochastic_depth.train.run_folder import common_fingerprint, is_untrained
from stochastic_depth.train.runtime import resolve_runtime

FORMAT = 1
MADE = {"lock", "runs", "claims"}
"""What is in the folder of every sweep besides `sweep.json`."""


@dataclass(frozen=True)
class Sweep:
    """A grid of runs in one folder; results are read from the run folders alone."""

    folder: Path
    kind: SweepKind
    grid: Grid
    config: Config
    fingerprint: str | None = None
    """SHA-256 of the data that all runs train on; None in a sweep that was begun before sweeps
    recorded it, until a run has begun."""

    @cached_property
    def configs(self) -> dict[Point, Config]:
        """The configuration of each run; one engine trains them all."""
        points = self.grid.points()
        configs = on_one_engine([point.of(self.config) for point in points])
        return dict(zip(points, configs, strict=True))

    def path(self, point: Point) -> Path:
        """The run folder of a point."""
        return self.folder / "runs" / point.name

    def begun(self, point: Point) -> bool:
        """Whether the run of a point has begun.

        Raises:
            RunError: when its folder has lost its `config.json`.
        """
        path = self.path(point)
        if not is_there(path) or is_there(path / layout.CONFIG):
            return is_there(path)
        if not is_untrained(path):
            raise layout.lost_config(path)
        return False  # its process was killed while it removed the folder

    def done(self, point: Point) -> bool:
        """Whether nothing is left to train. `read_run` checks that nothing was lost since."""
        return is_there(self.path(point) / layout.WEIGHTS)

    def failure(self, point: Point) -> str | None:
        """The recorded reason why the run of a point cannot be trained, or None."""
        return failure_of(self.path(point), inside=self.folder)

    def fail(self, point: Point, sentence: str) -> None:
        """Record why the run of a point cannot be trained."""
        path = self.path(point) / layout.FAILED
        write_whole(path, f"{sentence}\n".encode(), inside=self.folder)

    def ended(self, point: Point) -> bool:
        return self.done(point) or self.failure(point) is not None

    def journal_size(self, point: Point) -> int:
        """The size in bytes of a point's journal so far."""
        try:
            return (self.path(point) / layout.JOURNAL).lstat().st_size
        except FileNotFoundError:
            return 0

    def records(self, point: Point) -> list[Record]:
        """The records of a point's journal so far."""
        path = self.path(point)
        return open_run(path).records() if is_there(path) else []

    def require_own(self, runs: Iterable[Run]) -> None:
        """Refuse runs that are not those of this sweep's points, or that began on other data.

        A folder's name is no proof: it may have been renamed, or copied from another sweep.

        Raises:
            RunError: naming the first value that differs, or both fingerprints.
        """
        runs = list(runs)
        configs = {point.name: config for point, config in self.configs.items()}
        for run in runs:
            own = run.config.without_io().to_json()
            wanted = configs.get(run.path.name, run.config).without_io().to_json()
            if own != wanted:
                raise RunError(
                    f"{run.path} is not the run of this point of its sweep: "
                    f"{_difference('config', own, wanted)}; move it elsewhere, and the sweep "
                    "trains its own"
                )
        found = common_fingerprint(runs)
        if found and self.fingerprint and found != self.fingerprint:
            raise RunError(
                f"{self.folder} is a sweep on data with fingerprint {self.fingerprint[:12]}, its "
                f"runs began on data with {found[:12]}: remove {self.folder / 'runs'}, and the "
                "sweep trains them again"
            )


def open_sweep(folder: Path, kind: SweepKind, grid: Grid, config: Config) -> Sweep:
    """Open the sweep in `folder`, or begin it.

    If every run has ended, its data is not needed and nothing is written.

    Raises:
        ApplyError, ConfigError, DataError: when the grid has a run that cannot be trained; then no
            folder is created.
        RunError: when `folder` contains another sweep, runs of another one, or something else, or
            was begun on other data; and when it cannot be written.
    """
    sweep = Sweep(folder, kind, grid, config)
    sweep_file = folder / "sweep.json"
    _require_own(folder)
    wanted = {
        "format": FORMAT,
        "kind": kind,
        "grid": grid.to_json(),
        "recipe": config.recipe,
        "config": config.without_io().to_json(),
    }
    data = None
    if not is_there(sweep_file):
        data = _require_trainable(sweep)
        _write(folder, {**wanted, "fingerprint": data})
    found = _read(sweep_file)
    for name, value in wanted.items():
        if found.get(name) != value:
            difference = _difference(name, found.get(name), value)
            raise RunError(f"{folder} holds another sweep: {difference}; choose another --out")
    points = grid.points()
    paths = [path for path in map(sweep.path, points) if is_there(path / layout.CONFIG)]
    sweep = replace(sweep, fingerprint=found.get("fingerprint"))
    sweep.require_own(begun := [open_run(path) for path in paths])
    sweep = replace(sweep, fingerprint=sweep.fingerprint or common_fingerprint(begun))
    if all(map(sweep.ended, points)):
        return sweep
    _make(folder)
    data = data or _open_data(sweep).fingerprint
    if sweep.fingerprint not in (None, data):
        raise RunError(
            f"{folder} began on data with fingerprint {sweep.fingerprint[:12]}, this data has "
            f"{data[:12]}: give the data it began on, or choose another --out"
        )
    return replace(sweep, fingerprint=data)


def _require_trainable(sweep: Sweep) -> str:
    """Raise an error if a run of the sweep cannot be trained, as `begin` would.

    Neither p_L nor the seed matters, so one run is tried for each rule, depth and gating.

    Returns:
        The fingerprint of its data.
    """
    tried = {(p.rule, p.depth, p.gating): config for p, config in sweep.configs.items()}
    for config in tried.values():
        resolve_runtime(config)
    batches = _open_data(sweep)
    for config in tried.values():
        require_trainable(config, batches)
    return batches.fingerprint


def _open_data(sweep: Sweep) -> Batches:
    runtime = resolve_runtime(next(iter(sweep.configs.values())))
    return open_batches(sweep.config, replace(runtime, device="cpu"))


def read_sweep(folder: Path) -> Sweep:
    """The sweep that `open_sweep` has begun in `folder`.

    Raises:
        RunError: when its description cannot be understood.
    """
    sweep_file = folder / "sweep.json"
    found = _read(sweep_file)
    if found.get("format") != FORMAT:
        raise RunError(
            f"{sweep_file} has format {found.get('format')}, this version reads {FORMAT}: use the "
            "version that wrote it"
        )
    try:
        if found["kind"] not in get_args(SweepKind):
            raise TypeError(f"there is no sweep of {found['kind']!r}")
        grid = Grid(**{name: tuple(values) for name, values in found["grid"].items()})
        return Sweep(
            layout.with_name(folder),
            found["kind"],
            grid,
            Config.from_json(found["config"]),
            found.get("fingerprint"),
        )
    except (AttributeError, ConfigError, KeyError, TypeError) as error:
        raise RunError(f"{sweep_file} is not of a sweep: {error!r}") from error


def _require_own(folder: Path) -> None:
    """Raise a RunError if `folder` is not of a sweep, and holds something."""
    try:
        names = {p.name for p in folder.iterdir()} if folder.exists() else set()
    except OSError as error:
        raise RunError(f"{folder} cannot be a sweep's folder: {reason(error)}") from error
    if "sweep.json" in names or names >= MADE:  # where a damaged sweep.json was removed
        return
    strange = {name for name in names - MADE if not name.startswith(UNFINISHED)}
    if strange:
        raise RunError(
            f"{folder} is no sweep's folder, it holds {min(strange)}: choose another --out"
        )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("runs", "claims"):
            make_folder(folder / name)
        require_writable(folder / "lock")
    except OSError as error:
        raise RunError(f"{folder} cannot be a sweep's folder: {reason(error)}") from error


def _write(folder: Path, description: dict[str, Any]) -> None:
    """Write `sweep.json`, unless another process has written it in the meantime."""
    _make(folder)
    try:
        with FileLock(folder / "lock"):
            if not is_there(folder / "sweep.json"):
                content = json.dumps(description, indent=1).encode() + b"\n"
                write_whole(folder / "sweep.json", content)
    except OSError as error:
        raise RunError(f"{folder} cannot be a sweep's folder: {reason(error)}") from error


def _read(sweep_file: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_file(sweep_file, SMALL))
        if not isinstance(found, dict):
            raise TypeError("it holds no object")
        if not isinstance(found.get("fingerprint", ""), str):
            raise TypeError("its fingerprint is no text")
        return found
    except OSError as error:
        raise RunError(f"{sweep_file} cannot be read: {reason(error)}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise RunError(
            f"{sweep_file} cannot be understood: remove it and repeat the command that began the "
            f"sweep, whose runs stay ({error})"
        ) from error


def _difference(name: str, found: Any, wanted: Any) -> str:
    """The name of the first value that differs, and both values."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in (*wanted, *found):
            if found.get(key) != wanted.get(key):
                return _difference(f"{name}.{key}", found.get(key), wanted.get(key))
    return f"its {name} is {found}, not {wanted}"
