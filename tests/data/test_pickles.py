"""CIFAR's pickles: read if they are what was published, and else never unpickled."""

import builtins
import copyreg
import os
import pickle
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stochastic_depth.data.cifar import CIFAR10, read_batch
from stochastic_depth.errors import DataError
from support.data_sets import PUBLISHED, published

PROTOCOLS = range(6)
ARRAY = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)


def refused(content: bytes, folder: Path) -> None:
    path = folder / "data_batch_1"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"data_batch_1: MD5 checksum .*binary version"):
        read_batch(path, CIFAR10)


def test_the_checksums_are_those_that_torchvision_knows():
    datasets = pytest.importorskip("torchvision.datasets", reason="needs torchvision")
    listed = [
        (name, checksum)
        for kind in (datasets.CIFAR10, datasets.CIFAR100)
        for name, checksum in kind.train_list + kind.test_list
    ]
    listed += [(name, checksum) for _, name, checksum in datasets.SVHN.split_list.values()]
    assert dict(listed) == PUBLISHED


def test_a_file_of_another_published_name_is_refused(tmp_path):
    content = published("data_batch_2", pickle.dumps({b"data": ARRAY, b"labels": [1, 2, 3]}, 2))
    refused(content, tmp_path)


def python_2_pickle(data: np.ndarray, labels: list[int]) -> bytes:
    """As Python 2 and numpy 1 wrote the published files, in protocol 2."""

    def word(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text

    dtype = b"cnumpy\ndtype\n" + word(b"u1") + b"K\0K\x01\x87R(K\x03" + word(b"|") + b"NNN"
    dtype += 2 * b"J\xff\xff\xff\xff" + b"K\0tb"
    raw = b"T" + struct.pack("<i", data.size) + data.tobytes()
    shape = b"".join(b"J" + struct.pack("<i", n) for n in data.shape) + b"\x86"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + word(b"b") + b"\x87R"
    )
    array += b"(K\x01" + shape + dtype + b"\x89" + raw + b"tb"
    entries = (
        word(b"data")
        + array
        + word(b"labels")
        + b"]("
        + b"".join(b"K" + bytes([label]) for label in labels)
    )
    return b"\x80\x02}(" + entries + b"eu."


def test_a_published_pickle_of_python_2_is_read(tmp_path):
    path = tmp_path / "data_batch_1"
    path.write_bytes(published("data_batch_1", python_2_pickle(ARRAY, [9, 0, 5])))
    found = read_batch(path, CIFAR10)
    assert found.labels.tolist() == [9, 0, 5]
    np.testing.assert_array_equal(found.images, ARRAY.reshape(3, 3, 32, 32))


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


FOREIGN = {
    "os.system": lambda path: Calls(os.system, f"touch {path}"),
    "eval": lambda path: Calls(eval, f"open({str(path)!r}, 'w')"),
    "exec": lambda path: Calls(exec, f"open({str(path)!r}, 'w')"),
    "open": lambda path: Calls(open, str(path), "w"),
    "subprocess": lambda path: Calls(subprocess.call, ["touch", str(path)]),
    "path": lambda path: Calls(Path.touch, path),
    "getattr": lambda path: Calls(getattr, Calls(builtins.__import__, "os"), "system"),
    "numpy function": lambda path: Calls(np.save, str(path), ARRAY),
    "numpy fromfile": lambda path: Calls(np.fromfile, str(path)),
    "torch": lambda path: Calls(torch.save, [1], str(path)),
    "in a dictionary": lambda path: {"data": ARRAY, "labels": [Calls(os.mkdir, str(path))]},
    "codecs.open": lambda path: Calls(__import__("codecs").open, str(path), "w"),
    "a numpy scalar": lambda path: np.float64(1.0),
    "an array of objects": lambda path: np.array([Calls(os.mkdir, str(path)), None]),
    "an array of objects without any": lambda path: np.array([None, 1]),
    "a structured array": lambda path: np.zeros(3, [("a", "u1"), ("b", "O")]),
    "floats": lambda path: np.zeros(3),
    "the other byte order": lambda path: np.zeros(3, ">i4"),
    "an empty array": lambda path: np.zeros((0, 3072), np.uint8),
    "dtype called": lambda path: Calls(np.dtype, "O"),
    "dtype of a type": lambda path: Calls(np.dtype, int),
    "ndarray called": lambda path: Calls(np.ndarray, (2**40,), "u1"),
    "a tensor": lambda path: torch.zeros(3),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_pickle_is_refused_and_nothing_of_it_runs(kind, protocol, tmp_path):
    target = tmp_path / "it ran"
    content = pickle.dumps(FOREIGN[kind](target), protocol)
    refused(content, tmp_path)
    assert not target.exists()


def named(module: bytes, name: bytes) -> bytes:
    return b"c" + module + b"\n" + name + b"\n"


MULTIARRAY, DTYPE, NDARRAY = b"numpy._core.multiarray", named(b"numpy", b"dtype"), b"numpy\nndarray"
EMPTY_ARRAY = named(MULTIARRAY, b"_reconstruct") + b"c" + NDARRAY + b"\nK\0\x85C\x01b\x87R"
U1 = DTYPE + b"U\x02u1K\0K\x01\x87R"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b".",
        b"\x80\x02.",
        b"no pickle at all",
        b"\x80\x09}.",
        # A shape that needs more bytes than there are, or that is no shape.
        EMPTY_ARRAY + b"(K\x01J\xff\xff\xff\x7f\x85" + U1 + b"\x89C\x01xtb.",
        EMPTY_ARRAY + b"(K\x01J\xff\xff\xff\xff\x85" + U1 + b"\x89C\x01xtb.",
        EMPTY_ARRAY + b"(K\x01N" + U1 + b"\x89C\x01xtb.",
        EMPTY_ARRAY + b"(K\x01K\x01\x85" + U1 + b"\x89](Ketb.",
        EMPTY_ARRAY + b"(K\x01K\x01\x85U\x02u1\x89C\x01xtb.",
        EMPTY_ARRAY + b"Nb.",
        EMPTY_ARRAY + b".",
        # Attributes of admitted names, and changes to them.
        b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.",
        b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.tofile\x81\x93.",
        DTYPE + b"}U\x08__call__Nsb.",
        DTYPE + b"N}U\x06_buildNs\x86b.",
        named(b"_codecs", b"encode") + b"N}U\x06_buildNs\x86b.",
        named(b"_codecs", b"encode") + b"X\x01\0\0\0xX\x03\0\0\0hex\x86R.",
        named(b"_codecs", b"lookup") + b"X\x03\0\0\0hex\x85R.",
        DTYPE + b")\x81.",
        # Objects of the surroundings.
        b"Pid\n.",
        b"K\x01Q.",
        named(b"__main__", b"x") + b".",
        named(b"stochastic_depth.data.cifar", b"MD5") + b".",
        named(b"builtins", b"dict") + b")R.",
        b"(ios\nsystem\n.",
        # Sizes that are claimed, not sent.
        b"}r\xff\xff\xff\x7f.",
        b"}p4000000000\n.",
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x0f.",
        b"B\xff\xff\xff\x7fx.",
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x0f.",
        b"\x8b\xff\xff\xff\x7f.",
    ],
)
def test_a_hostile_or_damaged_pickle_is_refused(content, tmp_path):
    refused(content, tmp_path)


def test_the_registry_of_extensions_is_closed(tmp_path):
    copyreg.add_extension("os", "getcwd", 240)
    try:
        pickle.loads(b"\x82\xf0)R.")
        refused(b"\x82\xf0)R.", tmp_path)
    finally:
        copyreg.remove_extension("os", "getcwd", 240)
        copyreg.clear_extension_cache()


@pytest.mark.parametrize(
    "content",
    [
        b"}" + b")" + b"\x85" * 1_000_000 + b"Ns.",
        b"}(" + b"(" * 1_000_000 + b"t" * 1_000_000 + b"Nu.",
        # Each tuple holds the one before twice: hashing the last takes 2^60 steps.
        b"}K\x01\x85q\0" + b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(60)) + b"Ns.",
        b"}K\x01\x85\x94" + b"".join(b"h%c\x86\x94" % i for i in range(60)) + b"Ns.",
        b"}K\x01\x85" + b"2\x86" * 60 + b"Ns.",
    ],
)
def test_tuples_that_would_crash_or_hang_their_reader_are_refused(content, tmp_path):
    refused(content, tmp_path)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_a_truncated_or_altered_pickle_is_refused(data, tmp_path_factory):
    whole = pickle.dumps({b"data": ARRAY, b"labels": [1, 2, 3]}, 2)
    published("data_batch_1", whole)
    content, folder = bytearray(whole), tmp_path_factory.getbasetemp()
    cut = data.draw(st.integers(0, len(content) - 1))
    refused(bytes(content[:cut]), folder)
    content[cut] ^= data.draw(st.integers(1, 255))
    refused(bytes(content), folder)
