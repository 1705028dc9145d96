"""CIFAR's "python version": pickled dictionaries of numpy arrays and lists."""

from pathlib import Path

import torch
from torch import Tensor

from stochastic_depth.data.cifar.variants import Variant, join
from stochastic_depth.data.dataset import Images
from stochastic_depth.data.folders import all_files, any_file
from stochastic_depth.data.pickles import read_pickle
from stochastic_depth.errors import DataError

LABELS = {"cifar10": "labels", "cifar100": "fine_labels"}


def present(folder: Path, variant: Variant) -> bool:
    return any_file(folder, variant.pickle_files)


def read(folder: Path, variant: Variant) -> tuple[Images, Images]:
    """Training and test part.

    Raises:
        DataError: names the file that is missing, foreign or damaged. Nothing in it is executed.
    """
    parts = all_files(folder, variant.pickle_files)
    train, test = (join([read_batch(path, variant) for path in part]) for part in parts)
    return train, test


def read_batch(path: Path, variant: Variant) -> Images:
    """One file: `data`, uint8 [n, 3072], channel by channel, and n labels."""
    batch = read_pickle(path)
    data, labels = (entry(path, batch, key) for key in ("data", LABELS[variant.name]))
    if not isinstance(data, Tensor) or data.dtype != torch.uint8 or data.shape[1:] != (3072,):
        raise DataError(f"{path}: data is {describe(data)}, expected a uint8 array [n, 3072]")
    if isinstance(labels, list) and all(type(label) is int for label in labels):
        labels = torch.tensor(labels, dtype=torch.int64)
    if not isinstance(labels, Tensor) or labels.dtype.is_floating_point:
        raise DataError(f"{path}: labels are {describe(labels)}, expected a list of integers")
    return variant.images(data.reshape(-1, 3, 32, 32), labels, path)


def entry(path: Path, batch: object, key: str) -> object:
    # Python 2 wrote these files, so their keys arrive as bytes; files written again have words.
    if isinstance(batch, dict):
        for name in (key.encode(), key):
            if name in batch:
                return batch[name]
    found = describe(batch)
    if isinstance(batch, dict):
        names = [str(name)[:40] for name in batch if isinstance(name, str | bytes)]
        found += f" with {', '.join(names[:8]) or 'no names'}"
    raise DataError(f"{path}: expected a dictionary with {key!r}, found {found}")


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return f"a {type(value).__name__}"
