"""Hostile files, each read in a process with bounded memory.

`main` prints a line of JSON for each: how reading it ended, its peak memory, its processor seconds.
"""

import io
import json
import os
import pickle
import resource
import struct
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from stochastic_depth.data import batches, load
from stochastic_depth.data.cifar import CIFAR10
from stochastic_depth.errors import StochasticDepthError
from support.data_sets import (
    encode,
    png_of,
    table,
    write_binary,
    write_folders,
    write_imagenet,
    write_parquet,
    write_pickles,
    write_svhn,
)

HUGE = 100_000


def text_bomb() -> bytes:
    """A PNG with a comment that unpacks to 100 MB."""
    body = b"zTXtcomment\0\0" + zlib.compress(bytes(10**8))
    return png_of(32, struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)))


def saved(kind: str, size: tuple[int, int], **options: bool) -> bytearray:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, kind, **options)
    return bytearray(file.getvalue())


def jpeg_of(side: int) -> bytes:
    content = saved("JPEG", (32, 32))
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", side, side)
    return bytes(content)


def bmp_of(side: int) -> bytes:
    content = saved("BMP", (32, 32))
    content[18:26] = struct.pack("<ii", side, side)
    return bytes(content)


def webp_of(side: int) -> bytes:
    content = saved("WEBP", (32, 32), lossless=True)
    at = content.index(b"VP8L") + 9  # 14 bits of each side less one, and four of others
    (others,) = struct.unpack_from("<I", content, at)
    struct.pack_into("<I", content, at, others >> 28 << 28 | (side - 1) << 14 | side - 1)
    return bytes(content)


PICTURES = {
    "no bytes": b"",
    "text": b"this is no picture\n" * 50,
    "html": b"<!doctype html><html>404</html>",
    "a png of 100,000 x 100,000 pixels": png_of(HUGE),
    "a png of 2^31 - 1 x 2^31 - 1 pixels": png_of(2**31 - 1),
    "a jpeg of 65,500 x 65,500 pixels": jpeg_of(65_500),
    "a bmp of 100,000 x 100,000 pixels": bmp_of(HUGE),
    "a ppm of 100,000 x 100,000 pixels": b"P6 100000 100000 255\n" + bytes(3000),
    "a webp of 16,383 x 16,383 pixels": webp_of(16_383),
    "a png with a comment of 100 MB": text_bomb(),
    "a picture of 32 x 33 pixels": bytes(saved("PNG", (32, 33))),
    "a gif": bytes(saved("GIF", (32, 32))),
    "a pdf": bytes(saved("PDF", (32, 32))),
}


def cifar(folder: Path, write) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(20) % 10
    write(folder, CIFAR10, pixels, labels, pixels, labels)


def in_parquet(content: pa.Table, **options):
    def make(folder: Path) -> None:
        cifar(folder, write_parquet)
        pq.write_table(content, folder / "test-00000-of-00001.parquet", **options)
        load("cifar10", folder, validation=2)

    return make


def in_folder(content: bytes):
    def make(folder: Path) -> None:
        cifar(folder, write_folders)
        next((folder / "test" / "cat").iterdir()).write_bytes(content)
        load("cifar10", folder, validation=2)

    return make


def in_tree(change):
    def make(folder: Path) -> None:
        write_imagenet(folder)
        change(folder / "val" / "n02" / "n02_1.JPEG")
        read = batches("imagenet", folder, batch=4, seed=0, device="cpu")
        assert len(read.fingerprint) == 64
        list(read.evaluate("test"))

    return make


def replaced(make):
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


def in_mat(folder: Path) -> None:
    write_svhn(folder)
    (folder / "extra_32x32.mat").write_bytes(b"X = [1 2 3]\n" * 100)
    load("svhn", folder, validation=2)


def in_pickle(folder: Path) -> None:
    cifar(folder / "x", write_pickles)
    (folder / "x" / "data_batch_2").write_bytes(pickle.dumps({b"data": os.system}))
    load("cifar10", folder / "x", validation=2)


def in_binary(make_file):
    def make(folder: Path) -> None:
        cifar(folder / "x", write_binary)
        path = folder / "x" / "data_batch_2.bin"
        path.unlink()
        make_file(path)
        load("cifar10", folder / "x", validation=2)

    return make


def sparse(size: int):
    def make(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(size)

    return make


def twice(path: Path) -> None:
    path.parent.joinpath("loop").symlink_to(path.parent.parent)


HUGE_VALUE = b"\x89PNG" + bytes(3 * 10**6)
HOSTILE = {
    **{f"folder: {name}": in_folder(content) for name, content in PICTURES.items()},
    **{f"parquet: {name}": in_parquet(table([content], [1])) for name, content in PICTURES.items()},
    **{
        f"tree: {name}": in_tree(lambda path, content=content: path.write_bytes(content))
        for name, content in PICTURES.items()
        if name not in ("a picture of 32 x 33 pixels", "a png with a comment of 100 MB")
    },
    "tree: a pipe": in_tree(replaced(os.mkfifo)),
    "tree: a link to /dev/zero": in_tree(replaced(lambda path: path.symlink_to("/dev/zero"))),
    "tree: a link to nothing": in_tree(replaced(lambda path: path.symlink_to("nothing"))),
    "parquet: text": lambda folder: (
        cifar(folder, write_parquet),
        (folder / "test-00000-of-00001.parquet").write_bytes(b"a,b\n1,2\n" * 99),
        load("cifar10", folder),
    ),
    "parquet: 3 MB repeated 100,000 times in 20 KB": in_parquet(
        pa.table(
            {
                "img": pa.DictionaryArray.from_arrays(
                    pa.array(np.zeros(100_000, np.int32)), pa.array([HUGE_VALUE])
                ),
                "label": np.ones(100_000, np.int64),
            }
        ),
        store_schema=False,
    ),
    "parquet: a million rows in a few bytes": in_parquet(
        pa.table({"img": pa.nulls(10**6, pa.binary()), "label": np.ones(10**6, np.int64)})
    ),
    "parquet: a label out of range": in_parquet(
        table([encode(np.zeros((32, 32, 3), np.uint8))], [10])
    ),
    "mat: text": in_mat,
    "pickle: os.system": in_pickle,
    "binary: no bytes": in_binary(Path.touch),
    "binary: 2 TB that are not there": in_binary(sparse(2**41)),
    "binary: a label out of range": in_binary(lambda path: path.write_bytes(b"\x0a" * 3073)),
    "binary: a link to itself": in_binary(lambda path: path.symlink_to(path.name)),
    "binary: a folder": in_binary(Path.mkdir),
}


def held() -> int:
    """Bytes of memory, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    """The most bytes of memory since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise AssertionError


def main() -> None:
    """Read the files that are named on the command line, or all."""
    address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (address_space + 4 * 2**30,) * 2)
    for name in sys.argv[1:] or HOSTILE:
        with tempfile.TemporaryDirectory() as folder:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            before, began = held(), time.process_time()
            error = None
            try:
                HOSTILE[name](Path(folder))
            except Exception as raised:
                error = raised
            shown = {
                "name": name,
                "ours": isinstance(error, StochasticDepthError),
                "error": f"{type(error).__name__}: {error}",
                "names the file": folder in str(error),
                "memory": peak() - before,
                "seconds": time.process_time() - began,
            }
        print(json.dumps(shown), flush=True)


if __name__ == "__main__":
    main()
