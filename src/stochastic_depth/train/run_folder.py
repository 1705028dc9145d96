"""A run folder: create it, open it, and lock it for writing."""

import hashlib
import json
import os
import subprocess
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stochastic_depth.distributed.world import world_size
from stochastic_depth.errors import DataError, RunError
from stochastic_depth.files import (
    SMALL,
    is_there,
    names_in,
    read_file,
    reason,
    remove_unfinished,
    require_writable,
    whole_folder,
    write_new,
)
from stochastic_depth.plain_text import command
from stochastic_depth.train import layout
from stochastic_depth.train.checkpoint import Checkpoints
from stochastic_depth.train.config import Config
from stochastic_depth.train.journal import Record, read_journal
from stochastic_depth.train.plain_json import restore
from stochastic_depth.train.runtime import Runtime, machine, versions

FORMAT = 3
"""The number of the format of a run folder: of its description, its journal and its checkpoints."""


@dataclass(frozen=True)
class Run:
    """One run folder: `config.json`, `metrics.jsonl`, `checkpoints/`, `model.safetensors`."""

    path: Path
    id: str
    config: Config
    runtime: Runtime
    fingerprint: str
    """SHA-256 of the data that the run trains on."""
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    """Shape of one image: channels, height, width."""
    machine: dict[str, str | int] = field(default_factory=dict, hash=False)
    """The machine on which it began, as `runtime.machine` describes it."""

    @property
    def journal(self) -> Path:
        return self.path / layout.JOURNAL

    @property
    def weights(self) -> Path:
        return self.path / layout.WEIGHTS

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.path / layout.CHECKPOINTS, self.id, self.config.keep)

    def records(self) -> list[Record]:
        """The records of the journal so far."""
        return read_journal(self.journal, self.id)

    def is_finished(self) -> bool:
        """Whether it was trained to its end: its final weights are there, and its last record.

        Raises:
            RunError: when the weights are there, and the last record is missing.
        """
        if not is_there(self.weights):  # looked up before the journal, which may still grow
            return False
        records = self.records()
        reached = records[-1].epoch if records else 0
        if reached < self.config.epochs:
            raise RunError(
                f"{self.path} is finished, and {self.journal} ends at epoch {reached:g} of "
                f"{self.config.epochs}: lines are missing; put the original back, or remove "
                f"{self.path} and train it again"
            )
        return True

    def require_data(self, fingerprint: str) -> None:
        """Refuse data that is not the data on which the run began.

        Raises:
            RunError: naming both fingerprints.
        """
        if fingerprint != self.fingerprint:
            raise RunError(
                f"{self.path} began on data with fingerprint {self.fingerprint[:12]}, this data "
                f"has {fingerprint[:12]}: give the data it began on, or begin another run"
            )

    def remove_untrained(self) -> None:
        """Remove the folder if nothing was written since it was created."""
        if not is_there(self.path) or not is_untrained(self.path):
            return
        with suppress(OSError), self.writing():  # where it cannot be removed, it stays
            (self.path / layout.CONFIG).unlink()
            self.checkpoints.folder.rmdir()
            (self.path / layout.LOCK).unlink()
            self.path.rmdir()

    @contextmanager
    def writing(self) -> Iterator[Callable[[], None]]:
        """Lock this folder for writing; yields a function that checks that the lock still holds.

        Raises:
            RunError: when another process writes it, or nothing can be written; from the check,
                when the folder was removed or replaced.
        """
        path = self.path / layout.LOCK
        lock = FileLock(path, timeout=0)
        try:
            require_writable(path)
        except OSError as error:
            raise RunError(f"{path} cannot be used: {reason(error)}") from error
        try:
            lock.acquire()
            remove_unfinished(self.path)
            remove_unfinished(self.checkpoints.folder, inside=self.path)
            held = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except Timeout:
            raise RunError(
                f"{self.path} is being written by another process: let it finish, or stop it"
            ) from None
        except OSError as error:
            lock.release()
            raise RunError(f"{self.path} cannot be written: {reason(error)}") from error

        def check_lock() -> None:
            if not (path.exists() and os.path.samestat(os.fstat(held), path.stat())):
                raise RunError(
                    f"{self.path} was removed or replaced while it was being written: nothing "
                    "more is written there"
                )

        try:
            yield check_lock
        finally:
            os.close(held)
            lock.release()


def common_fingerprint(runs: Iterable[Run]) -> str | None:
    """The fingerprint of the data that all `runs` began on; None if there are no runs.

    Raises:
        RunError: when they began on different data; names two runs and both fingerprints.
    """
    first = None
    for run in runs:
        first = first or run
        if run.fingerprint != first.fingerprint:
            raise RunError(
                f"{run.path} began on data with fingerprint {run.fingerprint[:12]}, {first.path} "
                f"on data with {first.fingerprint[:12]}, so their results do not belong together: "
                "remove the one on the wrong data, or move it elsewhere"
            )
    return first.fingerprint if first else None


def is_untrained(path: Path) -> bool:
    """Whether it is certain that nothing was written into a run folder since it was created."""
    try:
        strange = set(names_in(path)) - {layout.CONFIG, layout.CHECKPOINTS, layout.LOCK}
        return not strange and not names_in(path / layout.CHECKPOINTS)
    except OSError:  # it cannot be read, or is a link
        return False


@contextmanager
def remove_untrained_on_error(runs: Sequence[Run]) -> Iterator[None]:
    """If data cannot be read, remove the folders of those `runs` in which nothing was trained yet.

    Repaired data has another fingerprint, so these runs could not resume on it.
    """
    try:
        yield
    except DataError:
        if world_size() == 1:
            for run in runs:
                run.remove_untrained()
        raise


def create_run(
    path: Path,
    config: Config,
    runtime: Runtime,
    fingerprint: str,
    classes: tuple[str, ...],
    shape: tuple[int, int, int],
) -> Run:
    """Create the folder and write `config.json`.

    Raises:
        RunError: when `path` exists or cannot be created.
    """
    refuse_existing(path)
    here = machine(runtime)
    run = Run(path, uuid.uuid4().hex, config, runtime, fingerprint, classes, shape, here)
    description = {
        "format": FORMAT,
        "id": run.id,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": config.to_json(),
        "runtime": asdict(runtime),
        "data": {"fingerprint": fingerprint, "classes": list(classes), "shape": list(shape)},
        "versions": versions(),
        "git_commit": _git_commit(),
        "machine": run.machine,
    }
    description["sha256"] = checksum(description)
    with whole_folder(path) as folder:
        (folder / layout.CHECKPOINTS).mkdir()
        write_new(folder / layout.CONFIG, json.dumps(description, indent=2).encode() + b"\n")
    return run


def open_run(path: Path) -> Run:
    """Open an existing run folder.

    Raises:
        RunError: when `path` contains no run, or its `config.json` is not valid.
    """
    path = layout.with_name(path)
    config_file = path / layout.CONFIG
    try:
        text = read_file(config_file, SMALL)
    except OSError as error:
        if layout.has_lost_config(path):
            raise layout.lost_config(path) from None
        why = f"{config_file} cannot be read: {reason(error)}"
        raise RunError(f"{path} is not a run folder: {why}") from None
    if not text.strip():
        raise RunError(
            f"{config_file} is empty: put the original back, or remove {path} and begin another run"
        )
    try:
        values = json.loads(text)
        if not isinstance(values, dict) or "format" not in values:
            raise RunError(
                f"{config_file} does not describe a run: put the original back, or give another "
                "folder"
            )
        if values["format"] != FORMAT:
            raise RunError(
                f"{path} was written by another version of this library: the format in its "
                f"{layout.CONFIG} is {values['format']!r}, and this version reads {FORMAT}; use "
                "the version that wrote it"
            )
        if values.pop("sha256", None) != checksum(values):
            raise RunError(
                f"{config_file} is damaged or was edited, its checksum does not match: put the "
                "original back, or begin another run (what a run does cannot be changed)"
            )
        channels, height, width = restore(tuple[int, ...], values["data"]["shape"], "data.shape")
        return Run(
            path,
            restore(str, values["id"], "id"),
            Config.from_json(values["config"]),
            restore(Runtime, values["runtime"], "runtime"),
            restore(str, values["data"]["fingerprint"], "data.fingerprint"),
            restore(tuple[str, ...], values["data"]["classes"], "data.classes"),
            (channels, height, width),
            dict(values["machine"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(
            f"{config_file} is damaged or was edited, it cannot be understood: put the original "
            f"back, or begin another run ({error})"
        ) from error


def checksum(description: dict[str, Any]) -> str:
    """SHA-256 of the fields of `config.json`, or of an analysis, besides the checksum itself."""
    return hashlib.sha256(json.dumps(description).encode()).hexdigest()


def refuse_existing(path: Path) -> None:
    """Raise an error if `path` exists, unless it is an empty folder, and not the current one.

    Raises:
        RunError: with advice on what to do.
    """
    if not is_there(path) or _is_replaceable(path):
        return
    if is_there(path / layout.CONFIG):
        raise RunError(
            f"{path} exists already: choose another --run, or resume it by "
            f"{command('train', '--resume', path)}"
        )
    raise RunError(f"{path} exists already, and is not a run: choose another --run")


def _is_replaceable(path: Path) -> bool:
    """Whether `path` is an empty folder, and not the current one: a shell would stay in the old."""
    try:
        return not names_in(path) and not path.samefile(os.curdir)
    except OSError:
        return False


def free_path(folder: Path, name: str) -> Path:
    """`folder/name`, or the first of `folder/name-2`, `folder/name-3`, ... that does not exist."""
    path, number = folder / name, 2
    while is_there(path):
        path, number = folder / f"{name}-{number}", number + 1
    return path


def _git_commit() -> str | None:
    """The commit of the source checkout that runs, or None if it is not a checkout."""
    source = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        # If this is installed inside another project's checkout, that commit is not ours.
        if not git("ls-files", source.name):
            return None
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None
    except (OSError, subprocess.SubprocessError):
        return None
