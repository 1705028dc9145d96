"""Read numeric arrays from a MATLAB 5 file, and trust nothing that the file says of itself.

scipy.io.loadmat reads the same files, but a damaged type code makes it crash the process.
Format: "MAT-File Level 5 File Format", MathWorks.
"""

import math
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from stochastic_depth.files import open_file

HEADER = 128
MATRIX, COMPRESSED = 14, 15
INT8, INT32, UINT32 = 1, 5, 6
STORAGE = {
    1: torch.int8,
    2: torch.uint8,
    3: torch.int16,
    4: torch.uint16,
    5: torch.int32,
    6: torch.uint32,
    7: torch.float32,
    9: torch.float64,
    12: torch.int64,
}
NUMERIC_CLASSES = range(6, 16)
COMPLEX = 0x0800
MOST_DIMENSIONS = 32
SMALL, MOST_PACKING = 2**26, 100
"""Bytes that compressed parts may always hold, and else how many times their file's size."""


def read_arrays(path: Path) -> dict[str, Tensor]:
    """The real numeric arrays in the file, by name, in the type in which they are stored.

    Arrays are stored column by column: a matrix [rows, columns] comes as [columns, rows], and so
    on for more dimensions, without a copy. Arrays of other kinds are left out.

    Raises:
        ValueError: truncated, damaged, or of another version.
        zlib.error: a compressed part is damaged.
    """
    arrays = {}
    with open_file(path, inside=0) as file:
        size = os.fstat(file.fileno()).st_size
        room = max(SMALL, MOST_PACKING * size)
        for kind, content in elements_of_file(file, size):
            if kind == COMPRESSED:
                content = inflate(content, room)
                room -= len(content)
            elif kind != MATRIX:
                raise ValueError(f"an element of kind {kind}")
            name, array = matrix(memoryview(content))
            if array is not None:
                arrays[name] = array
    return arrays


def elements_of_file(file: BinaryIO, size: int) -> Iterator[tuple[int, bytearray]]:
    if file.read(HEADER)[124:] != b"\0\x01IM":
        raise ValueError("no header of a little-endian MATLAB 5 file")
    while tag := file.read(8):
        if len(tag) < 8:
            raise ValueError("truncated")
        kind, length = struct.unpack("<II", tag)
        if length > size - file.tell():
            raise ValueError(f"truncated: {length} bytes expected")
        content = bytearray(file.read(length))
        yield kind, content


def inflate(content: bytearray, most: int, chunk: int = 2**24) -> bytearray:
    """The content of the one matrix in a compressed element, which states its size: `most` bytes
    at most."""
    stream = zlib.decompressobj()
    tag = stream.decompress(content, 8)
    kind, length = struct.unpack("<II", tag) if len(tag) == 8 else (0, 0)
    if kind != MATRIX:
        raise ValueError(f"an element of kind {kind} in a compressed one")
    if length > most:
        raise ValueError(f"{length} bytes in {len(content)} compressed ones")
    body = bytearray()
    while not stream.eof and len(body) <= length:
        before = len(body), len(stream.unconsumed_tail)
        body += stream.decompress(stream.unconsumed_tail, chunk)
        if (len(body), len(stream.unconsumed_tail)) == before:
            break
    if len(body) != length or not stream.eof:
        raise ValueError(f"{len(body)} bytes decompressed, {length} expected")
    return body


def elements(content: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The parts of a matrix; up to four bytes are stored within the tag."""
    position = 0
    while position + 8 <= len(content):
        kind, length = struct.unpack_from("<II", content, position)
        start, following = position + 8, position + 8 + -(-length // 8) * 8
        if kind >> 16:
            kind, length, start, following = kind & 0xFFFF, kind >> 16, position + 4, position + 8
        if start + length > len(content) or following < start + length:
            raise ValueError(f"truncated: {length} bytes expected")
        yield kind, content[start : start + length]
        position = following


def matrix(content: memoryview) -> tuple[str, Tensor | None]:
    """Name and array: [last dimension, ..., first dimension], or None if it is not numeric."""
    parts = [part for part, _ in zip(elements(content), range(4), strict=False)]
    if [kind for kind, _ in parts[:3]] != [UINT32, INT32, INT8]:
        raise ValueError("a matrix without its flags, dimensions and name")
    flags, dimensions, name = (part for _, part in parts[:3])
    if len(flags) != 8 or len(dimensions) % 4 or len(dimensions) > 4 * MOST_DIMENSIONS:
        raise ValueError("a matrix with damaged flags or dimensions")
    (flag,) = struct.unpack_from("<I", flags)
    title = bytes(name).decode("latin1")
    if flag & 0xFF not in NUMERIC_CLASSES or flag & COMPLEX:
        return title, None
    shape = struct.unpack(f"<{len(dimensions) // 4}i", dimensions)
    kind, stored = parts[3] if len(parts) > 3 else (0, memoryview(b""))
    if kind not in STORAGE:
        raise ValueError(f"{title} stored as numbers of kind {kind}")
    dtype = STORAGE[kind]
    if min(shape, default=-1) < 0 or len(stored) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{title} of shape {list(shape)} in {len(stored)} bytes")
    if not stored:
        raise ValueError(f"{title} of shape {list(shape)} is empty")
    # Bytes need no alignment, and they are the ones that are too large to copy.
    buffer = stored if dtype.itemsize == 1 else bytearray(stored)
    return title, torch.frombuffer(buffer, dtype=dtype).view(shape[::-1])
