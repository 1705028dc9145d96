"""A sweep: a grid of runs in one folder, with `sweep.json` and a run folder for each point."""

import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from filelock import FileLock

from stochastic_depth.choices import RuleName, SweepKind
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
from stochastic_depth.recipes.paper import gatings
from stochastic_depth.train import Config, Record, layout, open_run
from stochastic_depth.train.build import require_trainable
from stochastic_depth.train.engine_choice import on_one_engine
from stochastic_depth.train.open import open_batches
from stochastic_depth.train.runtime import resolve_runtime


@dataclass(frozen=True)
class Point:
    """One run of a sweep, given by what it changes in the configuration of the sweep."""

    rule: RuleName
    survival: float | None
    """p_L; None at constant depth."""
    depth: int
    seed: int
    gating: str | None = None
    """One of `recipes.paper.gatings`; None for the gating of the configuration."""

    @property
    def name(self) -> str:
        """The name of the run folder."""
        survival = "" if self.survival is None else f"-{self.survival}"
        gating = f"{self.gating}-" if self.gating else ""
        return f"{gating}{self.rule}{survival}-depth{self.depth}-seed{self.seed}"

    def of(self, config: Config) -> Config:
        """The configuration of this run."""
        if self.gating is not None:
            config = gatings(config)[self.gating]
        survival = replace(config.survival, rule=self.rule)
        if self.survival is not None:
            survival = replace(survival, final=self.survival)
        model = replace(config.model, depth=self.depth)
        return replace(config, survival=survival, model=model, seed=self.seed)


@dataclass(frozen=True)
class Grid:
    """Every rule at every p_L, and constant depth once, at every depth and from every seed."""

    rules: tuple[RuleName, ...]
    survival: tuple[float, ...]
    depths: tuple[int, ...]
    seeds: tuple[int, ...]
    gatings: tuple[str, ...] = ()
    """Names from `recipes.paper.gatings`, each of which replaces the configured gating."""

    def __post_init__(self) -> None:
        for name, values in asdict(self).items():
            if not values and name != "gatings":
                raise ConfigError(f"the grid has no {name}: give at least one value")
            if len(set(values)) < len(values):
                raise ConfigError(f"the grid's {name} are {list(values)}: give each value once")

    def points(self) -> list[Point]:
        """All points, seed by seed: a sweep that is stopped early has all curves of some seeds."""
        if self.gatings:
            return [
                Point("constant", None, depth, seed, gating)
                if gating == "constant"
                else Point(rule, survival, depth, seed, gating)
                for seed, depth, gating in product(self.seeds, self.depths, self.gatings)
                for rule, survival in product(self.rules, self.survival)
            ]
        return [
            Point(rule, survival, depth, seed)
            for seed, depth, rule in product(self.seeds, self.depths, self.rules)
            for survival in ((None,) if rule == "constant" else self.survival)
        ]

    def to_json(self) -> dict[str, Any]:
        return {name: list(values) for name, values in asdict(self).items() if values}


FORMAT = 1
OWN_FILES = {"sweep.json", "lock", "runs", "claims"}


@dataclass(frozen=True)
class Sweep:
    """A grid of runs in one folder; results are read from the run folders alone."""

    folder: Path
    kind: SweepKind
    grid: Grid
    config: Config

    @cached_property
    def configs(self) -> dict[Point, Config]:
        """The configuration of each run; one engine trains them all."""
        points = self.grid.points()
        configs = on_one_engine([point.of(self.config) for point in points])
        return dict(zip(points, configs, strict=True))

    def path(self, point: Point) -> Path:
        """The run folder of a point."""
        return self.folder / "runs" / point.name

    def done(self, point: Point) -> bool:
        return is_there(self.path(point) / layout.WEIGHTS)

    def failure(self, point: Point) -> str | None:
        """The recorded reason why the run of a point cannot be trained, or None."""
        path = self.path(point) / layout.FAILED
        try:
            return read_file(path, SMALL, inside=self.folder).decode().strip()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be read: {error}") from error

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


def open_sweep(folder: Path, kind: SweepKind, grid: Grid, config: Config) -> Sweep:
    """Open the sweep in `folder`, or begin it.

    Raises:
        ApplyError, ConfigError, DataError: when the grid has a run that cannot be trained; then no
            folder is created.
        RunError: when `folder` contains another sweep, or something else.
    """
    sweep = Sweep(folder, kind, grid, config)
    sweep_file = folder / "sweep.json"
    _require_own(folder)
    if not is_there(sweep_file):
        _require_trainable(sweep)
    wanted = {
        "format": FORMAT,
        "kind": kind,
        "grid": grid.to_json(),
        "recipe": config.recipe,
        "config": config.without_io().to_json(),
    }
    _make(folder)
    with FileLock(folder / "lock"):
        if not is_there(sweep_file):
            write_whole(sweep_file, json.dumps(wanted, indent=1).encode() + b"\n")
    found = _read(sweep_file)
    for name, value in wanted.items():
        if found.get(name) != value:
            difference = _difference(name, found.get(name), value)
            raise RunError(f"{folder} holds another sweep: {difference}; choose another --out")
    return sweep


def _require_trainable(sweep: Sweep) -> None:
    """Raise an error if a run of the sweep cannot be trained, as `begin` would.

    Neither p_L nor the seed matters, so one run is tried for each rule, depth and gating.
    """
    tried = {(p.rule, p.depth, p.gating): config for p, config in sweep.configs.items()}
    runtimes = [resolve_runtime(config) for config in tried.values()]
    batches = open_batches(sweep.config, replace(runtimes[0], device="cpu"))
    for config in tried.values():
        require_trainable(config, batches)


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
        grid = Grid(**{name: tuple(values) for name, values in found["grid"].items()})
        return Sweep(
            layout.with_name(folder), found["kind"], grid, Config.from_json(found["config"])
        )
    except (AttributeError, ConfigError, KeyError, TypeError) as error:
        raise RunError(f"{sweep_file} is not of a sweep: {error!r}") from error


def _require_own(folder: Path) -> None:
    """Raise a RunError if `folder` holds something that is not of a sweep."""
    try:
        strange = {p.name for p in folder.iterdir()} - OWN_FILES if folder.exists() else set()
    except OSError as error:
        raise RunError(f"{folder} cannot be a sweep's folder: {reason(error)}") from error
    strange = {name for name in strange if not name.startswith(UNFINISHED)}
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


def _read(sweep_file: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_file(sweep_file, SMALL))
        if not isinstance(found, dict):
            raise TypeError("it holds no object")
        return found
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{sweep_file} cannot be understood: {error}") from error


def _difference(name: str, found: Any, wanted: Any) -> str:
    """The name of the first value that differs, and both values."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in (*wanted, *found):
            if found.get(key) != wanted.get(key):
                return _difference(f"{name}.{key}", found.get(key), wanted.get(key))
    return f"its {name} is {found}, not {wanted}"
