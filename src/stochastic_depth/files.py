"""Open, read and write the files of runs, sweeps, exports, reports and data sets, in one safe way.

A folder that comes from somebody else may contain anything: a link to one of your files, a pipe
that never ends, a device. Only regular files are opened here, and the amount that is read is
bounded.

A path has to stay `inside` a folder, for example that of a run: nothing in it after that folder may
be a link. Users may link the folder itself, and those above it, as they like. By default `inside`
is the folder in which the file is, so that the file alone must not be a link. In data sets it may
be (`follow_links`).
"""

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader, FileIO
from pathlib import Path

from stochastic_depth.errors import RunError

UNFINISHED = ".unfinished-"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_KINDS = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
SMALL = 2**24
"""The largest size, in bytes, of a JSON file that is read."""
LARGE = 2**30
"""The largest size, in bytes, of a journal, an exported network or a data file that is read."""


def open_file(path: Path, inside: Path | None = None, follow_links: bool = False) -> BufferedReader:
    """Open a regular file for reading.

    Raises:
        OSError: when it is not a regular file, cannot be opened, or is reached through a link.
    """
    return os.fdopen(_open(path, os.O_RDONLY, inside, follow_links), "rb")


def open_for_appending(path: Path, inside: Path | None = None) -> FileIO:
    """Open a regular file for writing at its end, unbuffered; it is created if it does not exist.

    Raises:
        OSError: as `open_file`; and when the file has a second name, which would change with it.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    return os.fdopen(_open(path, flags, inside), "ab", buffering=0)


def read_file(
    path: Path, most: int, inside: Path | None = None, follow_links: bool = False
) -> bytes:
    """The whole content of a regular file.

    Args:
        most: the largest number of bytes that is accepted.

    Raises:
        OSError: as `open_file`; and when there are more bytes than `most`.
    """
    with open_file(path, inside, follow_links) as file:
        size = os.fstat(file.fileno()).st_size
        # Files of /proc and similar systems claim to be empty, and are not.
        content = file.read(most + 1) if size <= most else b""
        if max(size, len(content)) > most:
            size = max(size, len(content))
            raise OSError(errno.EINVAL, f"it has {size:,} bytes, at most {most:,} are read")
        return content


def require_file(path: Path, follow_links: bool = False) -> None:
    """Refuse what `open_file` refuses, before a library opens the file by its path.

    Raises:
        OSError: as `open_file`.
    """
    open_file(path, follow_links=follow_links).close()


def require_writable(path: Path, inside: Path | None = None) -> None:
    """Refuse what `open_for_appending` refuses, before a library opens the file by its path.

    A file that does not exist yet is accepted.

    Raises:
        OSError: as `open_for_appending`.
    """
    with suppress(FileNotFoundError), _folder(path.parent, inside) as folder:
        found = os.stat(path.name, dir_fd=folder, follow_symlinks=False)
        _require_regular(found, os.O_WRONLY)


def is_there(path: Path) -> bool:
    """Whether there is anything at `path`, even a link that leads nowhere."""
    return os.path.lexists(path)


def names_in(folder: Path, inside: Path | None = None) -> list[str]:
    """The names in a folder, sorted; an empty list if there is no folder.

    Args:
        inside: by default the folder above it, so that `folder` must not be a link; give `folder`
            itself to allow that.

    Raises:
        OSError: when it cannot be read, or is a link.
    """
    try:
        with _folder(folder, inside or folder.parent) as opened:
            return sorted(os.listdir(opened))
    except FileNotFoundError:
        return []


def make_folder(path: Path, inside: Path | None = None) -> None:
    """Create the folder `path` in an existing folder, unless it is there already.

    Raises:
        OSError: when it cannot be created, or something else is there.
    """
    with _folder(path.parent, inside) as above, suppress(FileExistsError):
        os.mkdir(path.name, dir_fd=above)
    with _folder(path, inside or path.parent):
        pass


def make_folders(path: Path) -> None:
    """Create the folder `path`, and those above it, unless they are there.

    Raises:
        RunError: when it cannot be created, or something else is there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise RunError(f"{path} is a file, not a folder: choose a different place") from error
    except OSError as error:
        raise RunError(f"{path} cannot be created: {reason(error)}") from error


def remove_file(path: Path, inside: Path | None = None) -> None:
    """Delete a file, if it is there.

    Raises:
        OSError: when it cannot be deleted, or its folder is a link.
    """
    with suppress(FileNotFoundError), _folder(path.parent, inside) as folder:
        os.unlink(path.name, dir_fd=folder)


def remove_unfinished(folder: Path, inside: Path | None = None) -> None:
    """Delete the half-written files that killed processes have left in `folder`.

    Args:
        inside: by default `folder`, which may be a link.

    Raises:
        OSError: as `names_in` and `remove_file`.
    """
    for name in names_in(folder, inside or folder):
        if name.startswith(UNFINISHED):
            remove_file(folder / name, inside)


def write_whole(path: Path, content: bytes, inside: Path | None = None) -> None:
    """Put `content` at `path`, replacing what was there, so that no reader sees half of it.

    If `path` is a link, the link is replaced, and the file that it points to stays as it is.

    Raises:
        RunError: when it cannot be written, for example because the disk is full; what was at
            `path` is intact.
    """
    unfinished = UNFINISHED + secrets.token_hex(8)  # nobody else can know this name
    try:
        with _folder(path.parent, inside) as folder:
            _require_replaceable(path.name, folder)
            try:
                _write_synced(unfinished, content, folder)
                os.replace(unfinished, path.name, src_dir_fd=folder, dst_dir_fd=folder)
                os.fsync(folder)
            except OSError:
                with suppress(OSError):
                    os.unlink(unfinished, dir_fd=folder)
                raise
    except OSError as error:
        raise RunError(f"{path} could not be written: {reason(error)}") from error


def write_output(path: Path, content: bytes) -> None:
    """As `write_whole`, and create the folders above `path` that are missing.

    Raises:
        RunError: as `make_folders` and `write_whole`.
    """
    make_folders(path.parent)
    write_whole(path, content)


def require_replaceable(path: Path) -> None:
    """Refuse what `write_whole` refuses, before there is anything to write.

    Raises:
        RunError: as `write_whole`.
    """
    unfinished = UNFINISHED + secrets.token_hex(8)
    try:
        with _folder(path.parent) as folder:
            _require_replaceable(path.name, folder)
            _write_synced(unfinished, b"", folder)
            os.unlink(unfinished, dir_fd=folder)
    except OSError as error:
        raise RunError(f"{path} could not be written: {reason(error)}") from error


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which appears at `path` with all that was put into it, or not at all.

    An empty folder at `path` is replaced.

    Raises:
        RunError: when there is something at `path`, or nothing can be created there.
    """
    unfinished = path.with_name(UNFINISHED + secrets.token_hex(8))
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        sync_folder(unfinished)
        unfinished.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        raise RunError(f"{path} cannot be created: {reason(error)}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_new(path: Path, content: bytes) -> None:
    """Create a new file; it is on disk when this returns.

    Raises:
        OSError: when there is something at `path`, or it cannot be created.
    """
    _write_synced(path, content, None)


def sync_folder(folder: Path) -> None:
    """Make what was created, renamed or removed in `folder` survive a power cut."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def reason(error: OSError) -> str:
    """The message of the operating system, and the remedy if the disk is full."""
    message = error.strerror or str(error)
    if error.errno in _FULL:
        message += "; make room, then resume the run or repeat the command"
    return message


@contextmanager
def reading(path: Path | None, error_class: type[Exception]) -> Iterator[None]:
    """Turn operating system errors while something is read into one sentence.

    Args:
        path: what is read; with None, the file or folder that the system names.

    Raises:
        error_class: in place of an OSError, naming the path and the reason.
    """
    try:
        yield
    except OSError as error:
        name = path or error.filename or "a file"
        raise error_class(f"{name} cannot be read: {reason(error)}") from error


def _open(path: Path, flags: int, inside: Path | None, follow_links: bool = False) -> int:
    with _folder(path.parent, inside) as folder:
        if not follow_links:
            flags |= os.O_NOFOLLOW
        with suppress(FileNotFoundError):  # checked first: opening a device can have an effect
            found = os.stat(path.name, dir_fd=folder, follow_symlinks=follow_links)
            _require_regular(found, flags)
        opened = os.open(path.name, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666, dir_fd=folder)
        try:
            _require_regular(os.fstat(opened), flags)
        except OSError:
            os.close(opened)
            raise
        return opened


def _require_regular(found: os.stat_result, flags: int) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    for is_kind, kind in _KINDS:
        if is_kind(found.st_mode):
            raise OSError(errno.EINVAL, f"it is {kind}, expected a regular file: remove it")
    if flags & (os.O_WRONLY | os.O_RDWR) and found.st_nlink > 1:
        raise OSError(
            errno.EMLINK,
            "it is a hard link, and its other name would be changed too: put a copy in its place",
        )


def _require_replaceable(name: str, folder: int) -> None:
    with suppress(FileNotFoundError):
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISLNK(found.st_mode):
            _require_regular(found, os.O_RDONLY)


@contextmanager
def _folder(path: Path, inside: Path | None = None) -> Iterator[int]:
    """A file descriptor of the folder `path`, in which nothing after `inside` is a link."""
    start = inside or path
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    opened = os.open(start, flags)
    try:
        for part in path.relative_to(start).parts:
            start = start / part
            try:
                below = os.open(part, flags | os.O_NOFOLLOW, dir_fd=opened)
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENOTDIR):
                    raise OSError(
                        errno.ENOTDIR, f"{start} is a link or a file, expected a folder: remove it"
                    ) from error
                raise
            os.close(opened)
            opened = below
        yield opened
    finally:
        os.close(opened)


def _write_synced(path: Path | str, content: bytes, folder: int | None) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o666, dir_fd=folder), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
