"""Find the files of a data set, check and read them, or download them."""

import hashlib
import shlex
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from stochastic_depth.errors import DataError
from stochastic_depth.extras import require
from stochastic_depth.files import LARGE, names_in, open_file, read_file, reading, require_file

ARCHIVES = (".tar.gz", ".tgz", ".tar", ".zip")


def read_data_file(path: Path) -> bytes:
    """The whole content of a file.

    Raises:
        DataError: when it cannot be read, is a device or a pipe, or is too large.
    """
    with reading(path, DataError):
        return read_file(path, LARGE, real_parts=0)


MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "extra_32x32.mat": "a93ce644f1a588dc4d68dda5feec44a7",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
}
"""Checksums of the published CIFAR and SVHN files by name, the same as in torchvision.

Two different files with the same MD5 can be produced together, but nobody can produce a file that
has the MD5 of a given one."""


@contextmanager
def open_published(path: Path, instead: str) -> Iterator[BinaryIO]:
    """Open a file of a known name, if its content is exactly what was published.

    Only such a file may be given to a reader that an altered file could harm: unpickling runs what
    the file asks for, and a damaged MATLAB file can crash scipy.

    Args:
        instead: names, for the error message, layouts that can be read safely whatever they
            contain.

    Raises:
        DataError: when it cannot be read, or has another checksum.
    """
    with reading(path, DataError), open_file(path, real_parts=0) as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
        if found != MD5[path.name]:
            raise DataError(
                f"{path}: MD5 checksum {found}, that of the published file is {MD5[path.name]}: "
                f"fetch the file again, or give {instead}"
            )
        file.seek(0)
        yield file


def data_folder(name: str, root: Path | str | None) -> Path:
    """The folder `root` as a path.

    Raises:
        DataError: when it is not given, or does not exist.
    """
    if root is None and name == "folder":
        raise DataError(
            "pictures of your own are read from --data.root DIR (root, in Python), the folder with "
            "train/CLASS/ and val/CLASS/"
        )
    if root is None:
        raise DataError(
            f"{name} needs files: give --data.root DIR (root, in Python), the folder that holds "
            "them, and with --data.download (download=True) they are fetched into it"
        )
    path = Path(root).expanduser()
    if not path.exists():
        held = "train/CLASS/ and val/CLASS/" if name == "folder" else name
        raise DataError(
            f"{path}: does not exist; --data.root (root, in Python) must be the folder that holds "
            f"{held}"
        )
    return path


def archives(root: Path) -> list[Path]:
    """Archives in `root`, or `root` itself if it is one."""
    candidates = sorted(root.iterdir()) if root.is_dir() else [root]
    return [path for path in candidates if path.name.endswith(ARCHIVES)]


def unpacking(archive: Path) -> str:
    """The command that unpacks an archive."""
    return shlex.join(["tar", "-xf", str(archive), "-C", str(archive.parent)])


def contents(root: Path, most: int = 8) -> str:
    """The names in a folder, for error messages."""
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


BY_HAND = {
    "cifar10": "cifar-10-python.tar.gz from www.cs.toronto.edu/~kriz/cifar.html",
    "cifar100": "cifar-100-python.tar.gz from www.cs.toronto.edu/~kriz/cifar.html",
    "svhn": "train_32x32.mat, extra_32x32.mat and test_32x32.mat from "
    "ufldl.stanford.edu/housenumbers",
}


MOST_UNPACKED = 2**30
"""The most bytes that an archive may unpack to; the published ones unpack to 186 million."""


def fetch(name: str, folder: Path) -> None:
    """Download the files of `name` into `folder` with torchvision, which checks their checksums.

    Raises:
        DataError: when the files cannot be downloaded.
        MissingExtraError: when torchvision is not installed.
    """
    datasets = require("torchvision.datasets", "data")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_special(folder)
        if name == "svhn":
            for url, file, md5 in datasets.SVHN.split_list.values():
                datasets.utils.download_url(url, str(folder), file, md5)
        else:
            cifar = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
            datasets.utils.download_url(cifar.url, str(folder), cifar.filename, cifar.tgz_md5)
            unpack(folder / cifar.filename, folder)
    except Exception as error:
        # The remedy is the same, whatever fails between here and the server.
        raise DataError(
            f"{name} could not be fetched into {folder} ({type(error).__name__}: {error}): "
            f"fetch {BY_HAND[name]} by hand, put it there and unpack it"
        ) from error


def _refuse_special(folder: Path) -> None:
    """Refuse pipes and devices among the files that torchvision reads to check them.

    Raises:
        OSError: when a file is a pipe or a device.
    """
    for name in names_in(folder, real_parts=0):
        if name.endswith((".gz", ".mat")):
            require_file(folder / name, real_parts=0)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar archive into `folder`: no files or links outside of it, and no devices.

    Raises:
        tarfile.TarError: when it contains anything else, or more than `MOST_UNPACKED` bytes.
    """
    room = MOST_UNPACKED
    with tarfile.open(archive) as members:
        for member in members:
            room -= member.size
            if room < 0:
                raise tarfile.TarError(f"{archive} unpacks to more than {MOST_UNPACKED:,} bytes")
            members.extract(member, folder, filter="data")
