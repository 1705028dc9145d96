"""Fetch a data set from where it is published: the only code that touches the network."""

import tarfile
from pathlib import Path

from stochastic_depth.errors import DataError
from stochastic_depth.extras import require
from stochastic_depth.files import names_in, require_file

BY_HAND = {
    "cifar10": "cifar-10-python.tar.gz from www.cs.toronto.edu/~kriz/cifar.html",
    "cifar100": "cifar-100-python.tar.gz from www.cs.toronto.edu/~kriz/cifar.html",
    "svhn": "train_32x32.mat, extra_32x32.mat and test_32x32.mat from "
    "ufldl.stanford.edu/housenumbers",
}


MOST_UNPACKED = 2**30
"""Bytes; the published archives unpack to 186 million."""


def fetch(name: str, folder: Path) -> None:
    """Put the files of `name` into `folder`, through torchvision, which checks their sums.

    Raises:
        DataError: no way to the files.
        MissingExtraError: torchvision is not installed.
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
        # Whatever goes wrong between here and the server, the remedy is the same.
        raise DataError(
            f"{name} could not be fetched into {folder} ({type(error).__name__}: {error}): "
            f"fetch {BY_HAND[name]} by hand, put it there and unpack it"
        ) from error


def _refuse_special(folder: Path) -> None:
    """What is there already is read by torchvision, to see whether it is whole.

    Raises:
        OSError: when it is a pipe or a device.
    """
    for name in names_in(folder, inside=0):
        if name.endswith((".gz", ".mat")):
            require_file(folder / name, inside=0)


def unpack(archive: Path, folder: Path) -> None:
    """The files of a tar archive into `folder`, and nothing outside of it, no links out of it, no
    devices.

    Raises:
        tarfile.TarError: anything else in it, or more than `MOST_UNPACKED` bytes.
    """
    room = MOST_UNPACKED
    with tarfile.open(archive) as members:
        for member in members:
            room -= member.size
            if room < 0:
                raise tarfile.TarError(f"{archive} unpacks to more than {MOST_UNPACKED:,} bytes")
            members.extract(member, folder, filter="data")
