"""Load a data set by its name, and cut it into batches."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

from stochastic_depth.data.batching import WHOLE, Batches, Shard, TensorBatches
from stochastic_depth.data.cifar import CIFAR10, CIFAR100, find_cifar, read_cifar
from stochastic_depth.data.dataset import DataSet, Images, check_count, reduced, stratified
from stochastic_depth.data.folder_batches import FolderBatches
from stochastic_depth.data.folders import data_folder, fetch
from stochastic_depth.data.svhn import has_svhn, hold_out_svhn, read_svhn
from stochastic_depth.errors import DataError, MissingExtraError
from stochastic_depth.extras import installing, require
from stochastic_depth.files import reading

DIGITS = tuple("0123456789")
DIGITS_TEST = 500


def read_digits() -> tuple[Images, Images]:
    """1,297 training and 500 test images, 8x8, grey, with their 17 levels spread over 0..255.

    Raises:
        MissingExtraError: when scikit-learn is not installed.
    """
    library = find_spec("sklearn")
    if library is None or library.origin is None:
        raise MissingExtraError(f"sklearn is not installed: {installing('train', 'sklearn')}")
    # scikit-learn's own function reads the same file, but imports SciPy first, which takes seconds.
    table = Path(library.origin).parent / "datasets" / "data" / "digits.csv.gz"
    rows = torch.from_numpy(require("numpy", "train").loadtxt(table, delimiter=","))
    pixels = rows[:, :64].mul(255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
    everything = Images(pixels, rows[:, 64].long())
    test, train = stratified(everything.labels, DIGITS_TEST, "digits", "test")
    return everything[train], everything[test]


# How many training images are held out: the numbers of the paper (section 4) for its data sets.
VALIDATION = {"digits": 100, "cifar10": 5_000, "cifar100": 5_000, "svhn": 6_000}


@reading(None, DataError)
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

    Held-out and kept images are chosen at random, in proportion to the classes, and are the same in
    every run.

    Args:
        name: `digits` (comes with scikit-learn, needs no root), `cifar10`, `cifar100` or `svhn`.
        root: the folder with the files.
        validation: how many training images to hold out; when not given, 100 for digits, 5,000 for
            CIFAR and 6,000 for SVHN.
        train: how many of the remaining training images to keep; all when not given.
        size: every image is reduced to this many pixels a side; images stay as they are when not
            given.
        download: whether to fetch the files into `root` if they are not there. Otherwise the
            network is never used.

    Raises:
        DataError: when the name is unknown, a file is missing or damaged, or a count or the size
            does not fit.
        MissingExtraError: when a library that this data set needs is not installed.
    """
    if name not in VALIDATION:
        raise DataError(
            f"there is no data set {name!r} that can be loaded into memory: choose from "
            f"{', '.join(VALIDATION)}; for imagenet and folder call batches()"
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
    """The folder with the files, which are downloaded first if that is allowed and needed."""
    if download and root is not None and not present(Path(root).expanduser()):
        fetch(name, Path(root).expanduser())
    return data_folder(name, root)


def hold_out(name: str, training: Images, count: int) -> tuple[Images, Images]:
    """Hold out `count` images for validation: returns the remaining images, then those held out."""
    check_count("validation", count, len(training) - 1)
    held, kept = stratified(training.labels, count, name, "validation")
    return training[kept], training[held]


def subset(name: str, training: Images, count: int) -> Images:
    """`count` of the training images, or all of them if that is their number."""
    check_count("train", count, len(training))
    if count == len(training):
        return training
    chosen, _ = stratified(training.labels, count, name, "train")
    return training[chosen]


TREES = ("imagenet", "folder")
"""Data sets that are folders of pictures: ImageNet, and your own pictures."""
PICTURE_SIDE = 224
"""The height and width, in pixels, to which pictures of a folder are scaled when none is given."""
# The paper augments CIFAR and ImageNet, not SVHN (section 4).
AUGMENTED = ("cifar10", "cifar100", *TREES)


@reading(None, DataError)
def batches(
    name: str,
    root: Path | str | None = None,
    *,
    batch: int,
    seed: int,
    device: torch.device | str,
    augment: bool | None = None,
    channels_last: bool = False,
    validation: int | None = None,
    train: int | None = None,
    size: int | None = None,
    download: bool = False,
    workers: int = 0,
    shard: Shard = WHOLE,
) -> Batches:
    """Read a data set and cut it into batches on `device`.

    Args:
        name: `imagenet`, `folder` (your own pictures, in train/<class>/ and val/<class>/), or a
            name that `load` knows.
        root, validation, train, size, download: as in `load`. Pictures of a folder are scaled to
            224 pixels a side when no size is given.
        augment: whether to crop and flip training images; when not given, all data sets except SVHN
            and digits are augmented.
        workers: how many processes decode folders of pictures; the other data sets are in memory.
        shard: the part of each batch that this process gets, where several processes train.

    Raises:
        DataError: as `load`.
        MissingExtraError: when a library that this data set needs is not installed.
    """
    if augment is None:
        augment = name in AUGMENTED
    if name not in TREES:
        data = load(name, root, validation=validation, train=train, size=size, download=download)
        return TensorBatches(
            data,
            batch=batch,
            augment=augment,
            seed=seed,
            device=device,
            channels_last=channels_last,
            shard=shard,
        )
    if download:
        raise DataError(
            f"{name} cannot be downloaded: give --data.root DIR (root, in Python), the folder with "
            "train/<class>/ and val/<class>/; ImageNet is at image-net.org, for those who register"
        )
    return FolderBatches(
        data_folder(name, root),
        batch=batch,
        seed=seed,
        device=device,
        workers=workers,
        channels_last=channels_last,
        validation=validation or 0,
        train=train,
        augment=augment,
        image_size=size or PICTURE_SIDE,
        name=name,
        shard=shard,
    )
