import builtins
import contextlib
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

from stochastic_depth.data.pickles import read_pickle
from stochastic_depth.errors import DataError

PROTOCOLS = range(6)
ARRAY = np.random.default_rng(0).integers(0, 256, (7, 12), dtype=np.uint8)


def read(content: bytes, folder: Path) -> object:
    path = folder / "batch"
    path.write_bytes(content)
    return read_pickle(path)


def before_numpy_2(content: bytes) -> bytes:
    """The same pickle with the module names of numpy 1."""
    if content[2:3] == b"\x95":
        content = content[:2] + content[11:]
    for module in (b"numpy._core.multiarray", b"numpy._core.numeric"):
        old = module.replace(b"._core", b".core")
        for head in (b"\x8c%c", b"X%c\0\0\0"):
            content = content.replace(head % len(module) + module, head % len(old) + old)
        content = content.replace(b"c" + module, b"c" + old)
    return content


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("names", [lambda content: content, before_numpy_2])
@pytest.mark.parametrize("dtype", ["u1", "i1", "<i4", "<i8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_numpy_are_read_in_every_protocol(protocol, names, dtype, order, tmp_path):
    array = np.asarray(ARRAY.astype(dtype), order=order)
    content = names(pickle.dumps({"data": array, "labels": [3, 1]}, protocol))
    assert (b"._core" in content) == (names is not before_numpy_2)
    found = read(content, tmp_path)
    assert isinstance(found, dict)
    assert list(found) == ["data", "labels"]
    assert found["labels"] == [3, 1]
    np.testing.assert_array_equal(found["data"], array)
    assert found["data"].dtype == torch.from_numpy(array).dtype


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


def test_a_pickle_of_python_2_is_read(tmp_path, recwarn):
    content = python_2_pickle(ARRAY, [9, 0, 255])
    found = read(content, tmp_path)
    assert isinstance(found, dict)
    assert found[b"labels"] == [9, 0, 255]
    np.testing.assert_array_equal(found[b"data"], ARRAY)


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
    with pytest.raises(DataError, match=r"batch: expected a pickle of numbers"):
        read(content, tmp_path)
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
        named(b"stochastic_depth.data.pickles", b"STANDS") + b".",
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
    with pytest.raises(DataError, match="batch: "):
        read(content, tmp_path)


def test_the_registry_of_extensions_is_closed(tmp_path):
    copyreg.add_extension("os", "getcwd", 240)
    try:
        pickle.loads(b"\x82\xf0)R.")
        with pytest.raises(DataError, match="EXT1"):
            read(b"\x82\xf0)R.", tmp_path)
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
    with pytest.raises(DataError, match=r"tuples within tuples|operation DUP"):
        read(content, tmp_path)


@settings(max_examples=150, deadline=None)
@given(protocol=st.sampled_from(PROTOCOLS), data=st.data())
def test_a_truncated_or_altered_pickle_gives_data_or_a_data_error(protocol, data, tmp_path_factory):
    content = bytearray(pickle.dumps({"data": ARRAY, "labels": list(range(7))}, protocol))
    folder = tmp_path_factory.getbasetemp()
    cut = data.draw(st.integers(0, len(content) - 1))
    with pytest.raises(DataError):
        read(bytes(content[:cut]), folder)
    content[cut] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DataError):
        read(bytes(content), folder)
