"""A data set by its name."""

from collections.abc import Callable
from pathlib import Path

from stochastic_depth.data.cifar import CIFAR10, CIFAR100, find_cifar, read_cifar
from stochastic_depth.data.dataset import DataSet, Images
from stochastic_depth.data.digits import CLASSES as DIGITS
from stochastic_depth.data.digits import read_digits
from stochastic_depth.data.download import fetch
from stochastic_depth.data.folders import data_folder, files_readable
from stochastic_depth.data.reduction import reduced
from stochastic_depth.data.split import check_count, stratified
from stochastic_depth.data.svhn import has_svhn, hold_out_svhn, read_svhn
from stochastic_depth.errors import DataError

# Training images held out: the paper's numbers (section 4) where it has the data set.
VALIDATION = {"digits": 100, "cifar10": 5_000, "cifar100": 5_000, "svhn": 6_000}


@files_readable()
def load(
    name: str,
    root: Path | str | None = None,
    *,
    validation: int | None = None,
    train: int | None = None,
    size: int | None = None,
    download: bool = False,
) -> DataSet:
    """Read and split a data set.

    name: `digits` (comes with scikit-learn, needs no root), `cifar10`, `cifar100` or `svhn`.
    root: the folder with the files. validation: how many training images to hold out, by default
    100, 5,000, 5,000 and 6,000. train: keep this many of the others, by default all. Both choices
    are random, in proportion to the classes, and the same in every run. size: reduce every image to
    this many pixels a side, by default none is reduced. download: fetch the files into root if they
    are not there; otherwise the network is never touched.

    Raises:
        DataError: an unknown name, a file that is missing or damaged, a count or a size that does
            not fit.
        MissingExtraError: a library that this data set needs is not installed.
    """
    if name not in VALIDATION:
        raise DataError(
            f"no data set {name!r} to load: choose from {', '.join(VALIDATION)}; imagenet stays on "
            "the disk and comes through batches()"
        )
    if validation is None:
        validation = VALIDATION[name]
    if name == "digits":
        if root is not None:
            raise DataError(f"digits comes with scikit-learn and has no files: leave out {root}")
        classes, (training, test) = DIGITS, read_digits()
        kept, held = hold_out(name, training, validation)
    elif name == "svhn":
        folder = prepare(name, root, download, present=has_svhn)
        classes, files = DIGITS, read_svhn(folder)
        test = files.test
        kept, held = hold_out_svhn(files, validation)
    else:
        variant = CIFAR10 if name == "cifar10" else CIFAR100
        folder = prepare(name, root, download, present=lambda path: find_cifar(path, variant))
        classes, (training, test) = variant.classes, read_cifar(folder, variant)
        kept, held = hold_out(name, training, validation)
    if train is not None:
        kept = subset(name, kept, train)
    if size is not None:
        kept, held, test = (reduced(name, part, size) for part in (kept, held, test))
    return DataSet(name, classes, kept, held, test)


def prepare(
    name: str, root: Path | str | None, download: bool, present: Callable[[Path], object]
) -> Path:
    """The folder with the files, which are fetched if that is allowed and needed."""
    if download and root is not None and not present(Path(root).expanduser()):
        fetch(name, Path(root).expanduser())
    return data_folder(name, root)


def hold_out(name: str, training: Images, count: int) -> tuple[Images, Images]:
    """`count` images for validation: returns the others first, then these."""
    check_count("validation", count, len(training) - 1)
    held, kept = stratified(training.labels, count, name, "validation")
    return training[kept], training[held]


def subset(name: str, training: Images, count: int) -> Images:
    """`count` of the training images; all of them if it is their number."""
    check_count("train", count, len(training))
    if count == len(training):
        return training
    chosen, _ = stratified(training.labels, count, name, "train")
    return training[chosen]
