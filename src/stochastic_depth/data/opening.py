"""Batches of a data set by its name."""

from pathlib import Path

import torch

from stochastic_depth.data.folder_batches import FolderBatches
from stochastic_depth.data.folders import data_folder, files_readable
from stochastic_depth.data.loading import load
from stochastic_depth.data.protocol import ALONE, Batches, Share
from stochastic_depth.data.tensor_batches import TensorBatches
from stochastic_depth.errors import DataError

# The paper augments CIFAR and ImageNet, not SVHN (section 4).
AUGMENTED = ("cifar10", "cifar100", "imagenet")


@files_readable()
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
    share: Share = ALONE,
) -> Batches:
    """Read a data set and cut it into batches on `device`.

    name: `imagenet`, or a name that `load` knows; root, validation, train, size, download: as in
    `load`.
    augment: by default for CIFAR and ImageNet, not for SVHN and digits. workers: processes that
    decode ImageNet's pictures; the other data sets lie in memory and need none. size: of ImageNet's
    pictures, pixels a side, by default 224. share: what to give of each batch, where several
    processes train.

    Raises:
        DataError: as `load`.
        MissingExtraError: a library that this data set needs is not installed.
    """
    if augment is None:
        augment = name in AUGMENTED
    if name != "imagenet":
        data = load(name, root, validation=validation, train=train, size=size, download=download)
        return TensorBatches(
            data,
            batch=batch,
            augment=augment,
            seed=seed,
            device=device,
            channels_last=channels_last,
            share=share,
        )
    if download:
        raise DataError(
            "imagenet cannot be downloaded without an account: fetch it from image-net.org and "
            "give root, the folder with train/<class>/ and val/<class>/"
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
        image_size=size or 224,
        share=share,
    )
