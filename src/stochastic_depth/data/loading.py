"""Load a data set by its name, and cut it into batches."""

from dataclasses import replace
from pathlib import Path

import torch

from stochastic_depth.data.batching import WHOLE, Batches, Shard, TensorBatches
from stochastic_depth.data.dataset import DataSet, reduced, subset
from stochastic_depth.data.folder_batches import FolderBatches
from stochastic_depth.data.sources import SOURCES, Download, Source
from stochastic_depth.errors import DataError
from stochastic_depth.extras import require
from stochastic_depth.files import reading


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
    source = SOURCES.get(name)
    if source is None or source.read is None:
        in_memory = ", ".join(name for name, source in SOURCES.items() if source.read is not None)
        raise DataError(
            f"there is no data set {name!r} that can be loaded into memory: choose from "
            f"{in_memory}; for imagenet and folder call batches()"
        )
    folder = folder_of(name, source, root, download)
    data = source.read(folder, source.validation if validation is None else validation)
    if train is not None:
        data = replace(data, train=subset(name, data.train, train))
    if size is not None:
        parts = {part: reduced(name, images, size) for part, images in data.parts.items()}
        data = replace(data, **parts)
    return data


def folder_of(name: str, source: Source, root: Path | str | None, download: bool) -> Path:
    """The folder of a data set; its files are fetched first if that is allowed and needed.

    Raises:
        DataError: when it is not given or does not exist, or the files cannot be fetched.
    """
    if source.files is None:
        if root is not None:
            raise DataError(f"{name} comes with scikit-learn and has no files: leave out {root}")
        return Path()
    held = f"DIR (root, in Python), the folder with {source.files}"
    if download and source.download is None:
        raise DataError(
            f"{name} cannot be downloaded: give --data.root {held}; ImageNet is at image-net.org, "
            "for those who register"
        )
    if root is None:
        fetched = ", and with --data.download (download=True) they are fetched into it"
        raise DataError(
            f"{name} needs files: give --data.root {held}{fetched if source.download else ''}"
        )
    path = Path(root).expanduser()
    if download and source.download is not None and not source.download.present(path):
        fetch(name, source.download, path)
    if not path.exists():
        raise DataError(f"{path}: does not exist; give --data.root {held}")
    return path


def fetch(name: str, download: Download, folder: Path) -> None:
    """Download the files of a data set into `folder`, with torchvision.

    Raises:
        DataError: when the files cannot be downloaded.
        MissingExtraError: when torchvision is not installed.
    """
    datasets = require("torchvision.datasets", "data")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        download.fetch(datasets, folder)
    except Exception as error:
        # The remedy is the same, whatever fails between here and the server.
        raise DataError(
            f"{name} could not be fetched into {folder} ({type(error).__name__}: {error}): "
            f"fetch {download.by_hand} by hand, put it there and unpack it"
        ) from error


@reading(None, DataError)
def batches(
    name: str,
    root: Path | str | None = None,
    *,
    batch: int,
    seed: int,
    device: torch.device | str,
    augment: bool | None = None,
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
    source = SOURCES.get(name)
    if source is None:
        raise DataError(f"there is no data set {name!r}: choose from {', '.join(SOURCES)}")
    if augment is None:
        augment = source.augmented
    if source.read is not None:
        data = load(name, root, validation=validation, train=train, size=size, download=download)
        return TensorBatches(
            data,
            batch=batch,
            augment=augment,
            seed=seed,
            device=device,
            shard=shard,
        )
    return FolderBatches(
        folder_of(name, source, root, download),
        batch=batch,
        seed=seed,
        device=device,
        workers=workers,
        validation=source.validation if validation is None else validation,
        train=train,
        augment=augment,
        image_size=source.side if size is None else size,
        name=name,
        shard=shard,
    )
