"""Look into the folder that should hold a data set."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stochastic_depth import files
from stochastic_depth.errors import DataError

ARCHIVES = (".tar.gz", ".tgz", ".tar", ".zip")


@contextmanager
def files_readable() -> Iterator[None]:
    """Around all that reads a data set.

    Raises:
        DataError: in place of what the system says of a file or a folder.
    """
    try:
        yield
    except OSError as error:
        name = error.filename or "a file of the data set"
        raise DataError(f"{name}: cannot be read ({error.strerror or error})") from error


def read_file(path: Path) -> bytes:
    """All of a file.

    Raises:
        DataError: it cannot be read, is a device or a pipe, or too large.
    """
    with file_readable(path):
        return files.read_file(path, files.LARGE, inside=0)


@contextmanager
def file_readable(path: Path) -> Iterator[None]:
    """Around all that reads one file.

    Raises:
        DataError: in place of what the system says of it.
    """
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({files.reason(error)})") from error


def data_folder(name: str, root: Path | str | None) -> Path:
    """`root` as a path.

    Raises:
        DataError: it is not given, or does not exist.
    """
    if root is None:
        raise DataError(
            f"{name} needs files: give root, the folder that holds them, or allow the download "
            "into that folder with download=True"
        )
    path = Path(root).expanduser()
    if not path.exists():
        raise DataError(f"{path}: does not exist; root must be the folder that holds {name}")
    return path


def archives(root: Path) -> list[Path]:
    """Packed files in `root`, or `root` itself if it is one."""
    candidates = sorted(root.iterdir()) if root.is_dir() else [root]
    return [path for path in candidates if path.name.endswith(ARCHIVES)]


def unpacking(archive: Path) -> str:
    """The command for it, whatever the archive is called."""
    return shlex.join(["tar", "-xf", str(archive), "-C", str(archive.parent)])


def contents(root: Path, most: int = 8) -> str:
    """What is in a folder, for messages."""
    if not root.is_dir():
        return "a file"
    names = sorted(path.name + "/" * path.is_dir() for path in root.iterdir())
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join(names[:most] + more) or "an empty folder"


def any_file(folder: Path, parts: tuple[tuple[str, ...], ...]) -> bool:
    """Whether the folder holds at least one of these files."""
    return any((folder / name).is_file() for part in parts for name in part)


def all_files(folder: Path, parts: tuple[tuple[str, ...], ...]) -> list[list[Path]]:
    """The files of each part.

    Raises:
        DataError: some of them are missing.
    """
    found = [[folder / name for name in part] for part in parts]
    missing = [path.name for part in found for path in part if not path.is_file()]
    if missing:
        raise DataError(
            f"{folder}: {', '.join(missing)} missing beside the files that are there: "
            "unpack the archive again"
        )
    return found
