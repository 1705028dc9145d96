"""Find the published files of a data set, check and read them."""

import hashlib
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from stochastic_depth.errors import DataError
from stochastic_depth.files import LARGE, open_file, read_file, reading

ARCHIVES = (".tar.gz", ".tgz", ".tar", ".zip")


def read_data_file(path: Path) -> bytes:
    """The whole content of a file.

    Raises:
        DataError: when it cannot be read, is a device or a pipe, or is too large.
    """
    with reading(path, DataError):
        return read_file(path, LARGE, follow_links=True)


@contextmanager
def open_published(path: Path, checksums: Mapping[str, str], instead: str) -> Iterator[BinaryIO]:
    """Open a file of a known name, if its content is exactly what was published.

    Only such a file may be given to a reader that an altered file could harm: unpickling runs what
    the file asks for, and a damaged MATLAB file can crash scipy. Two different files with the same
    MD5 can be produced together, but nobody can produce a file that has the MD5 of a given one.

    Args:
        checksums: the MD5 of each published file, by its name.
        instead: names, for the error message, layouts that can be read safely whatever they
            contain.

    Raises:
        DataError: when it cannot be read, or has another checksum.
    """
    with reading(path, DataError), open_file(path, follow_links=True) as file:
        found, published = hashlib.file_digest(file, "md5").hexdigest(), checksums[path.name]
        if found != published:
            raise DataError(
                f"{path}: MD5 checksum {found}, that of the published file is {published}: "
                f"fetch the file again, or give {instead}"
            )
        file.seek(0)
        yield file


def archives(root: Path) -> list[Path]:
    """Archives in `root`, or `root` itself if it is one."""
    candidates = sorted(root.iterdir()) if root.is_dir() else [root]
    return [path for path in candidates if path.name.endswith(ARCHIVES)]


def unpacking(archive: Path) -> str:
    """The command that unpacks an archive."""
    source, target = str(archive), str(archive.parent)
    if archive.suffix == ".zip":  # which GNU tar cannot read
        return shlex.join(["python", "-m", "zipfile", "-e", source, target])
    return shlex.join(["tar", "-xf", source, "-C", target])


def contents(root: Path) -> str:
    """The first eight names in a folder, for error messages."""
    if not root.is_dir():
        return "a file"
    names = sorted(path.name + "/" * path.is_dir() for path in root.iterdir())
    more = [f"and {len(names) - 8} more"] if len(names) > 8 else []
    return ", ".join(names[:8] + more) or "an empty folder"


def any_file(folder: Path, parts: tuple[tuple[str, ...], ...]) -> bool:
    """Whether the folder holds at least one of these files."""
    return any((folder / name).is_file() for part in parts for name in part)


def all_files(folder: Path, parts: tuple[tuple[str, ...], ...]) -> list[list[Path]]:
    """The files of each part.

    Raises:
        DataError: when some of them are missing.
    """
    found = [[folder / name for name in part] for part in parts]
    missing = [path.name for part in found for path in part if not path.is_file()]
    if missing:
        raise DataError(
            f"{folder}: {', '.join(missing)} missing beside the files that are there: "
            "unpack the archive again"
        )
    return found
