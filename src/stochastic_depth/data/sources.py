"""The data sets by name, and all that differs between them. A new data set is an entry here."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stochastic_depth.data import cifar, digits, svhn
from stochastic_depth.data.dataset import DataSet, split


@dataclass(frozen=True)
class Download:
    """How the files of a data set are fetched."""

    fetch: Callable[[Any, Path], None]
    """Fetches them into a folder, given `torchvision.datasets`, which checks their checksums."""
    present: Callable[[Path], object]
    """Whether they are in a folder already."""
    by_hand: str
    """What to fetch by hand, and from where."""


@dataclass(frozen=True)
class Source:
    """One data set."""

    title: str
    """Its name in tables and titles."""
    side: int
    """The width and height of the images in pixels, unless a size is chosen."""
    validation: int
    """How many training images are held out; in the paper, section 4, if it has the data set."""
    augmented: bool
    """Whether training images are cropped and flipped, as the paper (section 4) does with CIFAR
    and ImageNet, not with SVHN."""
    read: Callable[[Path, int], DataSet] | None
    """Reads the files in a folder, and holds out a number of training images. None for pictures in
    folders, which do not fit into memory."""
    files: str | None
    """What its folder holds, for error messages; None if it needs no folder."""
    download: Download | None = None


def _cifar(variant: cifar.Variant, title: str, archive: str) -> Source:
    return Source(
        title=title,
        side=cifar.SIDE,
        validation=5_000,
        augmented=True,
        read=lambda root, validation: split(
            variant.name, variant.classes, *cifar.read_cifar(root, variant), validation
        ),
        files=f"{title} in one of its public layouts",
        download=Download(
            fetch=lambda datasets, root: cifar.fetch_cifar(datasets, variant, root),
            present=lambda root: cifar.find_cifar(root, variant),
            by_hand=f"{archive} from www.cs.toronto.edu/~kriz/cifar.html",
        ),
    )


SOURCES: dict[str, Source] = {
    "digits": Source(
        title="digits",
        side=8,
        validation=100,
        augmented=False,
        read=lambda _, validation: split(
            "digits", digits.CLASSES, *digits.read_digits(), validation
        ),
        files=None,
    ),
    "cifar10": _cifar(cifar.CIFAR10, "CIFAR-10", "cifar-10-python.tar.gz"),
    "cifar100": _cifar(cifar.CIFAR100, "CIFAR-100", "cifar-100-python.tar.gz"),
    "svhn": Source(
        title="SVHN",
        side=32,
        validation=svhn.VALIDATION,
        augmented=False,
        read=svhn.split_svhn,
        files=", ".join(svhn.FILES),
        download=Download(
            fetch=svhn.fetch_svhn,
            present=svhn.has_svhn,
            by_hand=f"{', '.join(svhn.FILES)} from ufldl.stanford.edu/housenumbers",
        ),
    ),
    "imagenet": Source(
        title="ImageNet",
        side=224,
        validation=0,
        augmented=True,
        read=None,
        files="train/CLASS/ and val/CLASS/",
    ),
    "folder": Source(
        title="pictures",
        side=224,
        validation=0,
        augmented=True,
        read=None,
        files="train/CLASS/ and val/CLASS/",
    ),
}
"""All data sets, by the names in `choices.DataName`."""
