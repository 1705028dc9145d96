"""Every reader of foreign bytes as a function of the bytes: for tests and for `make fuzz`."""

import hashlib
import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save

from stochastic_depth.data.cifar import CIFAR10, read_parquet_file, read_records
from stochastic_depth.data.pictures import decode_one, open_picture
from stochastic_depth.recipes import RECIPES
from stochastic_depth.train import Config, open_run
from stochastic_depth.train.checkpoint import (
    MAGIC,
    load_checkpoint,
    save_checkpoint,
)
from stochastic_depth.train.journal import read_journal
from stochastic_depth.train.run_folder import checksum, create_run
from stochastic_depth.train.runtime import resolve_runtime
from stochastic_depth.train.weights import read_weights, write_weights
from support.data_sets import encode

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)


@cache
def folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="readers-"))


def in_file(read: Callable[[Path], object], name: str = "file") -> Callable[[bytes], None]:
    """A reader of bytes, made of a reader of files."""

    def of_bytes(content: bytes) -> None:
        path = folder() / name
        path.write_bytes(content)
        read(path)

    return of_bytes


def with_checksum(payload: bytes) -> bytes:
    """A checkpoint with a right checksum, so that what reads its payload is fuzzed too."""
    return MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload


def read_payload(payload: bytes) -> None:
    in_file(lambda path: load_checkpoint(path, "a"))(with_checksum(payload))


def read_config(content: bytes) -> None:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return
    Config.from_json(values)


def read_description(content: bytes) -> None:
    try:
        values = json.loads(content)
        values["sha256"] = checksum({k: v for k, v in values.items() if k != "sha256"})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return
    in_file(lambda path: open_run(path.parent), "config.json")(json.dumps(values).encode())


READERS: dict[str, Callable[[bytes], object]] = {
    "binary": in_file(lambda path: read_records(path, CIFAR10)),
    "parquet": in_file(lambda path: read_parquet_file(path, CIFAR10)),
    "small picture": lambda content: decode_one(content, "here", 32),
    "picture": in_file(open_picture),
    "checkpoint": in_file(lambda path: load_checkpoint(path, "a")),
    "checkpoint past its checksum": read_payload,
    "weights": in_file(read_weights),
    "journal": in_file(lambda path: read_journal(path, "a")),
    "run": in_file(lambda path: open_run(path.parent), "config.json"),
    "run past its checksum": read_description,
    "configuration": read_config,
}


def of_parquet(**options) -> bytes:
    column = pa.array([{"bytes": encode(PIXELS[0], "PNG"), "path": None}])
    file = io.BytesIO()
    pq.write_table(pa.table({"img": column, "label": pa.array([3])}), file, **options)
    return file.getvalue()


def of_checkpoint() -> bytes:
    path = folder() / "whole.ckpt"
    state = {"w": torch.arange(5.0), "n": [1, 2.5, None, True, "x"], "o": {0: {"m": torch.ones(2)}}}
    save_checkpoint(path, {"run": "a", "step": 1, **state})
    return path.read_bytes()


def of_weights() -> bytes:
    path = folder() / "whole.safetensors"
    write_weights(path, {"a": torch.arange(4.0), "b": torch.tensor(1)}, {"run": "a"})
    return path.read_bytes()


def of_run() -> bytes:
    config = replace(RECIPES["digits"](), device="cpu", engine="eager", precision="float32")
    path = folder() / "run"
    create_run(path, config, resolve_runtime(config), "f" * 64, ("a", "b"), (1, 8, 8))
    return (path / "config.json").read_bytes()


def of_journal() -> bytes:
    from support.runs import append_records, record

    with tempfile.TemporaryDirectory(dir=folder()) as inside:
        path = Path(inside) / "journal"
        append_records(path, "a", [record(1), record(2)])
        return path.read_bytes()


@cache
def whole_files() -> dict[str, list[bytes]]:
    """Good files of each reader, to begin with."""
    rows = PIXELS.transpose(0, 3, 1, 2).reshape(4, 3072)
    pictures = [encode(PIXELS[0], kind) for kind in ("PNG", "JPEG", "BMP", "WEBP", "PPM")]
    configurations = [json.dumps(recipe().to_json()).encode() for recipe in RECIPES.values()]
    described, checkpoint = of_run(), of_checkpoint()
    return {
        "binary": [b"\3" + rows[0].tobytes()],
        "parquet": [of_parquet(compression=kind) for kind in ("none", "snappy", "zstd", "gzip")],
        "small picture": pictures,
        "picture": pictures,
        "checkpoint": [checkpoint],
        "checkpoint past its checksum": [checkpoint[len(MAGIC) + 65 :]],
        "weights": [of_weights(), save({"a": torch.ones(1)})],
        "journal": [of_journal()],
        "run": [described],
        "run past its checksum": [described],
        "configuration": configurations[:4],
    }
