"""CIFAR's "binary version": records of one or two label bytes and 3,072 pixels."""

from pathlib import Path

import torch

from stochastic_depth.data.cifar.variants import Variant, join
from stochastic_depth.data.dataset import Images
from stochastic_depth.data.folders import all_files, any_file, read_file
from stochastic_depth.errors import DataError

PIXELS = 3 * 32 * 32


def present(folder: Path, variant: Variant) -> bool:
    return any_file(folder, variant.binary_files)


def read(folder: Path, variant: Variant) -> tuple[Images, Images]:
    """Training and test part.

    Raises:
        DataError: names the file that is missing or not a whole number of records.
    """
    parts = all_files(folder, variant.binary_files)
    train, test = (join([read_records(path, variant) for path in part]) for part in parts)
    return train, test


def read_records(path: Path, variant: Variant) -> Images:
    """One file; the last label byte of each record is the (fine) label."""
    record = variant.binary_label_bytes + PIXELS
    content = read_file(path)
    if len(content) == 0 or len(content) % record:
        raise DataError(
            f"{path}: {len(content)} bytes, expected records of {record} bytes for "
            f"{variant.name}: fetch it again"
        )
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, record)
    pixels = records[:, variant.binary_label_bytes :].reshape(-1, 3, 32, 32)
    return variant.images(pixels, records[:, variant.binary_label_bytes - 1], path)
