import contextlib
import struct
import zlib

import numpy as np
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st

from stochastic_depth.data.mat5 import HEADER, read_arrays

DAMAGE = (ValueError, zlib.error)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "i8", "f4", "f8"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 4), (5, 7), (2, 3, 4), (4, 3, 2, 5)])
def test_arrays_that_scipy_wrote_are_read_back_transposed(compressed, dtype, shape, tmp_path):
    array = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    content = {"a": array, "a_longer_name": array[:1]}
    scipy.io.savemat(tmp_path / "x.mat", content, do_compression=compressed)
    found = read_arrays(tmp_path / "x.mat")
    assert list(found) == list(content)
    for name, expected in content.items():
        np.testing.assert_array_equal(found[name], expected.T)
        assert found[name].numpy().dtype == dtype


def test_what_is_not_a_real_numeric_array_is_left_out(tmp_path):
    content = {"word": "abc", "cell": np.array([1, "a"], object), "record": {"a": 1}, "i": 1j}
    scipy.io.savemat(tmp_path / "x.mat", content | {"n": 3})
    assert {name: array.item() for name, array in read_arrays(tmp_path / "x.mat").items()} == {
        "n": 3
    }


@pytest.mark.parametrize("compressed", [False, True])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_truncated_or_altered_file_gives_arrays_or_an_error(compressed, data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "x.mat"
    array = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    scipy.io.savemat(path, {"X": array, "y": np.ones((5, 1))}, do_compression=compressed)
    content = bytearray(path.read_bytes())
    cut = data.draw(st.integers(0, len(content) - 1))
    path.write_bytes(content[:cut])
    if cut < HEADER:
        with pytest.raises(ValueError, match="no header"):
            read_arrays(path)
    else:
        # A file may end between two arrays.
        with contextlib.suppress(*DAMAGE):
            assert list(read_arrays(path)) in ([], ["X"])
    content[cut] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(*DAMAGE):
        read_arrays(path)


def a_file(*elements):
    return b" " * 124 + b"\0\x01IM" + b"".join(elements)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\x02IM",
        b" " * 124 + b"\x01\0MI",
        a_file(b"\x0e"),
        a_file(struct.pack("<II", 14, 2**32 - 1)),
        a_file(struct.pack("<II", 14, 0)),
        a_file(struct.pack("<II", 9, 8), bytes(8)),
        a_file(struct.pack("<II", 15, 4), b"abcd"),
    ],
)
def test_another_version_or_a_false_size_is_refused(content, tmp_path):
    (tmp_path / "x.mat").write_bytes(content)
    with pytest.raises(DAMAGE):
        read_arrays(tmp_path / "x.mat")


def test_a_compressed_part_may_not_hold_more_than_it_states(tmp_path):
    bomb = zlib.compress(struct.pack("<II", 14, 64) + bytes(2**26))
    (tmp_path / "x.mat").write_bytes(a_file(struct.pack("<II", 15, len(bomb)), bomb))
    with pytest.raises(ValueError, match="bytes decompressed, 64 expected"):
        read_arrays(tmp_path / "x.mat")
