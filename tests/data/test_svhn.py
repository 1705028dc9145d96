import io
import struct
import zlib

import numpy as np
import pytest
import scipy.io
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stochastic_depth.data import Images, load, svhn
from stochastic_depth.data.svhn import read_mat, read_svhn
from stochastic_depth.errors import DataError
from support.data_sets import write_svhn


@pytest.mark.parametrize("compressed", [False, True])
def test_the_three_files_are_read_and_ten_means_zero(compressed, tmp_path):
    made = write_svhn(tmp_path, do_compression=compressed)
    for found, (pixels, digits) in zip(read_svhn(tmp_path), made.values(), strict=True):
        np.testing.assert_array_equal(found.images, pixels.transpose(0, 3, 1, 2))
        np.testing.assert_array_equal(found.labels, digits)


def test_by_default_400_of_each_class_come_from_train_and_200_from_extra(monkeypatch, tmp_path):
    def part(n, mark):
        labels = torch.arange(n) % 10
        images = torch.full((n, 3, 1, 1), mark, dtype=torch.uint8)
        return Images(images, labels)

    monkeypatch.setattr(svhn, "read_svhn", lambda _: [part(4_500, 0), part(2_700, 1), part(10, 2)])
    data = load("svhn", tmp_path)
    kept, held = data.train, data.validation
    assert (len(kept), len(held)) == (1_200, 6_000)
    from_extra = held.images[:, 0, 0, 0] == 1
    assert held.labels[~from_extra].bincount().tolist() == [400] * 10
    assert held.labels[from_extra].bincount().tolist() == [200] * 10
    assert kept.labels.bincount().sum() + held.labels.bincount().sum() == 7_200


def test_too_small_a_set_for_the_paper_s_split_asks_for_a_number(tmp_path):
    write_svhn(tmp_path)
    with pytest.raises(DataError, match="class 0 has 6 images, 400 of each"):
        load("svhn", tmp_path)


def test_another_number_is_taken_from_both_files_and_nothing_is_lost(tmp_path):
    made = write_svhn(tmp_path)
    data = load("svhn", tmp_path, validation=30)
    assert (len(data.train), len(data.validation), len(data.test)) == (120, 30, 30)
    assert data.validation.labels.bincount().tolist() == [3] * 10
    everything = np.concatenate([made["train"][0], made["extra"][0]])
    found = torch.cat([data.train.images, data.validation.images]).permute(0, 2, 3, 1)
    assert {image.tobytes() for image in found.contiguous().numpy()} == {
        image.tobytes() for image in everything
    }


def test_the_missing_extra_file_is_named_with_its_source(tmp_path):
    write_svhn(tmp_path)
    (tmp_path / "extra_32x32.mat").unlink()
    with pytest.raises(DataError, match=r"extra_32x32.mat: missing; .*ufldl.*Found test_32x32.mat"):
        load("svhn", tmp_path)


X = np.zeros((32, 32, 3, 4), np.uint8)
Y = np.ones((4, 1), np.uint8)


CONTENTS = [
    {"X": X},
    {"y": Y},
    {},
    {"X": X.astype(float), "y": Y},
    {"X": X[:31], "y": Y},
    {"X": X, "y": Y[:3]},
    {"X": X[..., :0], "y": Y[:0]},
    {"X": X, "y": Y * 11},
    {"X": X, "y": Y * 0},
    {"X": X, "y": Y * float("nan")},
    {"X": X, "y": Y * 1.5},
    {"X": X, "y": np.array([["a"]] * 4, dtype=object)},
]


def refused(path, content):
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path.name}: MD5 checksum .*--data.name folder"):
        read_mat(path)


@pytest.mark.parametrize("content", CONTENTS)
def test_a_file_with_other_content_is_refused(content, tmp_path):
    write_svhn(tmp_path)
    file = io.BytesIO()
    scipy.io.savemat(file, content)
    refused(tmp_path / "extra_32x32.mat", file.getvalue())


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(share, tmp_path):
    write_svhn(tmp_path)
    path = tmp_path / "test_32x32.mat"
    refused(path, path.read_bytes()[: int(share * path.stat().st_size)])


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_an_altered_file_is_refused(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("svhn")
    write_svhn(folder, {"test": 1})
    path = folder / "test_32x32.mat"
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    refused(path, content)


def a_file(*elements):
    return b" " * 124 + b"\0\x01IM" + b"".join(elements)


BOMB = zlib.compress(struct.pack("<II", 14, 64) + bytes(2**26))


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
        a_file(struct.pack("<II", 15, len(BOMB)), BOMB),
    ],
)
def test_another_version_or_a_false_size_is_refused(content, tmp_path):
    refused(tmp_path / "test_32x32.mat", content)
