"""Encoded images and labels in parquet files, the layout of the Hugging Face hub.

All images of a data set have one size.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stochastic_depth.data.pictures import decode
from stochastic_depth.errors import DataError
from stochastic_depth.extras import require
from stochastic_depth.files import require_file

IMAGE_COLUMNS = ("img", "image")
MOST_BYTES = 2**15
"""The most bytes of one encoded picture; 32x32 pixels in colour have 3,072 bytes."""
MOST_PACKING = 100
"""The most bytes that images may unpack to, for each byte of the file."""
ROWS = 8
"""How many rows are read at a time, because a few bytes can encode one large value a million
times."""
SHARD = re.compile(r"-(\d{5})-of-(\d{5})(-[0-9a-f]+)?$")


def shards(folder: Path, part: str) -> list[Path]:
    """The files of one part, in order, and complete according to their `-00000-of-00003` names.

    Args:
        part: "train" or "test".

    Raises:
        DataError: when there is no file, or one is missing.
    """
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


def read_shard(path: Path, label_columns: tuple[str, ...], side: int) -> tuple[Tensor, Tensor]:
    """The pixels, uint8 [n, 3, side, side], and the labels, int64 [n], of one file.

    Args:
        label_columns: the names that the column of labels may have; images are in `img` or `image`.
        side: the width and height in pixels of every image.

    Raises:
        DataError: when the file or a row is not as expected; names it.
        MissingExtraError: when pyarrow or Pillow is not installed.
    """
    arrow, parquet = require("pyarrow", "data"), require("pyarrow.parquet", "data")
    encoded: list[bytes | None] = []
    labels = [torch.empty(0, dtype=torch.int64, device="cpu")]
    try:
        require_file(path, follow_links=True)
        with parquet.ParquetFile(path) as file:
            claimed, length = file.metadata.num_rows, path.stat().st_size
            if claimed > length:
                raise DataError(
                    f"{path}: claims {claimed:,} images in {length:,} bytes: fetch it again"
                )
            room = max(2**26, MOST_PACKING * length)
            names = file.schema_arrow.names
            image = column(path, names, IMAGE_COLUMNS)
            label = column(path, names, label_columns)
            for batch in file.iter_batches(ROWS, columns=[image, label]):
                read = pictures(path, image, batch.column(image), len(encoded), side)
                room -= sum(len(content or b"") for content in read)
                if room < 0:
                    raise DataError(
                        f"{path}: its images unpack to over {MOST_PACKING} times {length:,} bytes"
                    )
                encoded += read
                labels.append(integers(path, label, batch.column(label)))
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: no readable parquet file ({error}): fetch it again") from error
    pixels = decode(len(encoded), encoded.__getitem__, lambda i: f"{path}, row {i}", side)
    return pixels, torch.cat(labels)


def pictures(path: Path, name: str, values: Any, first: int, side: int) -> list[bytes | None]:
    """The encoded pictures of some rows; `first` is the number of the first row."""
    types = require("pyarrow", "data").types
    found = values.type
    if types.is_struct(found) and found.get_field_index("bytes") >= 0:
        values = values.field("bytes")
    if not (types.is_binary(values.type) or types.is_large_binary(values.type)):
        raise DataError(
            f"{path}: column {name} is {found}, expected encoded images "
            "as bytes or as struct<bytes, path>: fetch the version with the images inside"
        )
    encoded = values.to_pylist()
    for row, content in enumerate(encoded, start=first):
        if content is not None and len(content) > MOST_BYTES:
            raise DataError(
                f"{path}, row {row}: {len(content):,} bytes, expected an image of "
                f"{side}x{side} pixels in at most {MOST_BYTES:,}"
            )
    return encoded


def integers(path: Path, name: str, values: Any) -> Tensor:
    types = require("pyarrow", "data").types
    if not types.is_integer(values.type) or values.null_count:
        raise DataError(
            f"{path}: column {name} is {values.type} with {values.null_count} nulls, expected one "
            "integer for each row"
        )
    return torch.tensor(values.to_pylist(), dtype=torch.int64, device="cpu")


def column(path: Path, names: list[str], wanted: tuple[str, ...]) -> str:
    for name in wanted:
        if name in names:
            return name
    raise DataError(
        f"{path}: columns {', '.join(names)}, expected one named {' or '.join(wanted)}: "
        "is it another data set?"
    )
