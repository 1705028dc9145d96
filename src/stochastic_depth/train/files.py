"""Files that are whole or not there: written beside, fsynced, renamed."""

import os
import tempfile
from pathlib import Path

from stochastic_depth.errors import RunError

UNFINISHED = ".unfinished-"


def write_whole(path: Path, content: bytes) -> None:
    """Put `content` at `path`, replacing what was there, so that no reader ever sees a part of it.

    Raises:
        RunError: when it cannot be written (a full disk, say); what was at `path` is intact.
    """
    unfinished = None
    try:
        handle, unfinished = tempfile.mkstemp(prefix=UNFINISHED, dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        sync_folder(path.parent)
    except OSError as error:
        if unfinished is not None:
            Path(unfinished).unlink(missing_ok=True)
        raise RunError(f"{path} could not be written: {error.strerror or error}") from error


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
