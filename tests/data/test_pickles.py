"""CIFAR's pickles: read if they are what was published, and else never unpickled."""

import os
import pickle
import struct

import numpy as np
import pytest

from stochastic_depth.data.cifar import CIFAR10, read_batch
from stochastic_depth.errors import DataError
from support.data_sets import PUBLISHED, published

ARRAY = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)


WHOLE = pickle.dumps({b"data": ARRAY, b"labels": [1, 2, 3]}, 2)


class Command:
    """Pickles as a call."""

    def __reduce__(self):
        return os.system, ("exit 1",)


OTHERS = {
    "nothing": b"",
    "cut short": WHOLE[:-1],
    "longer": WHOLE + b".",
    "one bit": WHOLE[:99] + bytes([WHOLE[99] ^ 1]) + WHOLE[100:],
    "a command": pickle.dumps(Command(), 2),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_nothing_but_what_was_published_is_unpickled(kind, tmp_path, monkeypatch):
    published("data_batch_1", WHOLE)
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled"))
    (tmp_path / "data_batch_1").write_bytes(OTHERS[kind])
    with pytest.raises(DataError, match=r"data_batch_1: MD5 checksum .*binary version"):
        read_batch(tmp_path / "data_batch_1", CIFAR10)


def test_the_checksums_are_those_that_torchvision_knows():
    datasets = pytest.importorskip("torchvision.datasets", reason="needs torchvision")
    listed = [
        (name, checksum)
        for kind in (datasets.CIFAR10, datasets.CIFAR100)
        for name, checksum in kind.train_list + kind.test_list
    ]
    listed += [(name, checksum) for _, name, checksum in datasets.SVHN.split_list.values()]
    assert dict(listed) == PUBLISHED


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


def test_a_file_of_another_published_name_is_refused(tmp_path):
    content = published("data_batch_2", python_2_pickle(ARRAY, [1, 2, 3]))
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(DataError, match="data_batch_1: MD5 checksum"):
        read_batch(tmp_path / "data_batch_1", CIFAR10)
