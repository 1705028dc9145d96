"""Files and folders that are whole or not there: written beside, fsynced, renamed."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stochastic_depth.errors import RunError

UNFINISHED = ".unfinished-"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_whole(path: Path, content: bytes) -> None:
    """Put `content` at `path`, replacing what was there, so that no reader ever sees a part of it.

    Raises:
        RunError: when it cannot be written (a full disk, say); what was at `path` is intact.
    """
    unfinished = _beside(path)
    try:
        write_synced(unfinished, content)
        os.replace(unfinished, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink()
        raise RunError(f"{path} could not be written: {refusal(error)}") from error


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which appears at `path` with all that was put into it, or not at all.

    Raises:
        RunError: when there is something at `path`, or nothing can be made there.
    """
    unfinished = _beside(path)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        sync_folder(unfinished)
        unfinished.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        raise RunError(f"{path} cannot be made: {refusal(error)}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_synced(path: Path, content: bytes) -> None:
    """Make a new file, on disk when this returns."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames and removals in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_unfinished(folder: Path) -> None:
    """Delete what killed processes left half-written in `folder`."""
    for path in folder.glob(f"{UNFINISHED}*"):
        path.unlink(missing_ok=True)


def refusal(error: OSError) -> str:
    """What the system says, and the remedy where the disk is full."""
    said = error.strerror or str(error)
    return f"{said}; make room, then go on" if error.errno in _FULL else said


def _beside(path: Path) -> Path:
    """A name that nobody can guess, so that nobody can have put anything there."""
    return path.with_name(UNFINISHED + secrets.token_hex(8))
