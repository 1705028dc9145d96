"""A folder for compiled code that nobody else can have put anything into."""

import os
import stat
from pathlib import Path

from stochastic_depth.errors import EngineError


def private_cache() -> Path:
    """`stochastic-depth` in the user's cache folder, made if need be, readable by its owner alone.

    Raises:
        EngineError: when it is another user's, or cannot be made.
    """
    try:
        above = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = above / "stochastic-depth"
        above.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        if not folder.is_dir() or not is_ours(folder):
            raise EngineError(
                f"{folder} is not a folder of yours, and what it holds would be run: remove it, or "
                "set XDG_CACHE_HOME to a folder of your own"
            )
        folder.chmod(0o700)
    except (OSError, RuntimeError) as error:
        raise EngineError(
            f"there is no folder for compiled code ({error}): set XDG_CACHE_HOME to one that can "
            "be written, or use --engine eager"
        ) from error
    return folder


def is_ours(path: Path) -> bool:
    """Whether it belongs to this user, and is no link."""
    found = path.lstat()
    return found.st_uid == os.geteuid() and not stat.S_ISLNK(found.st_mode)


def only_we_write(path: Path) -> bool:
    """Whether nobody but this user can have written the file."""
    return is_ours(path) and not path.lstat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)
