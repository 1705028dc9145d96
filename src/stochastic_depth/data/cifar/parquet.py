"""CIFAR as encoded images in parquet files, the layout of the Hugging Face hub."""

import re
from pathlib import Path

import torch

from stochastic_depth.data.cifar.variants import SIZE, Variant, join
from stochastic_depth.data.dataset import Images
from stochastic_depth.data.pictures import decode
from stochastic_depth.errors import DataError
from stochastic_depth.extras import require

IMAGE_COLUMNS = ("img", "image")
SHARD = re.compile(r"-(\d{5})-of-(\d{5})(-[0-9a-f]+)?$")


def present(folder: Path, variant: Variant) -> bool:
    return any(any(folder.glob(f"{part}*.parquet")) for part in ("train", "test"))


def read(folder: Path, variant: Variant) -> tuple[Images, Images]:
    """Training and test part, from `train-*.parquet` and `test-*.parquet`.

    Raises:
        DataError: names the file, and the row, that is missing or not as expected.
        MissingExtraError: pyarrow or Pillow is not installed.
    """
    train, test = (
        join([read_shard(path, variant) for path in shards(folder, part)])
        for part in ("train", "test")
    )
    return train, test


def shards(folder: Path, part: str) -> list[Path]:
    """The files of one part, in order and complete by their `-00000-of-00003` names."""
    paths = sorted([*folder.glob(f"{part}-*.parquet"), *folder.glob(f"{part}.parquet")])
    if not paths:
        raise DataError(f"{folder}: no {part}-*.parquet, expected both train and test: fetch it")
    numbers = [match.groups() if (match := SHARD.search(path.stem)) else None for path in paths]
    if not any(numbers):
        return paths
    found = [(int(number[0]), int(number[1])) if number else None for number in numbers]
    total = max(number[1] for number in found if number)
    if found != [(i, total) for i in range(total)]:
        raise DataError(
            f"{folder}: expected the {total} shards {part}-00000-of-{total:05}.parquet and so on, "
            f"found {', '.join(path.name for path in paths)}: fetch the missing, remove the others"
        )
    return paths


def read_shard(path: Path, variant: Variant) -> Images:
    """One file with an image column (`img` or `image`) and a label column."""
    arrow, parquet = require("pyarrow", "data"), require("pyarrow.parquet", "data")
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            image = column(path, names, IMAGE_COLUMNS)
            label = column(path, names, variant.label_columns)
            table = file.read([image, label])
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: no readable parquet file ({error}): fetch it again") from error
    if not arrow.types.is_integer(table.schema.field(label).type) or table[label].null_count:
        raise DataError(
            f"{path}: column {label} is {table.schema.field(label).type} with "
            f"{table[label].null_count} nulls, expected one integer for each row"
        )
    encoded = table[image].combine_chunks()
    if arrow.types.is_struct(encoded.type) and encoded.type.get_field_index("bytes") >= 0:
        encoded = encoded.field("bytes")
    if not (arrow.types.is_binary(encoded.type) or arrow.types.is_large_binary(encoded.type)):
        raise DataError(
            f"{path}: column {image} is {table.schema.field(image).type}, expected encoded images "
            "as bytes or as struct<bytes, path>: fetch the version with the images inside"
        )
    pixels = decode(
        len(encoded), lambda i: encoded[i].as_py(), lambda i: f"{path}, row {i}", size=SIZE
    )
    labels = torch.tensor(table[label].to_pylist(), dtype=torch.int64)
    return variant.images(pixels, labels, path)


def column(path: Path, names: list[str], wanted: tuple[str, ...]) -> str:
    for name in wanted:
        if name in names:
            return name
    raise DataError(
        f"{path}: columns {', '.join(names)}, expected one named {' or '.join(wanted)}: "
        "is it another data set?"
    )
