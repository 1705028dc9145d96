import numpy as np
import pytest
import scipy.io
import torch

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


OTHERS = {
    "nothing": lambda whole: b"",
    "cut short": lambda whole: whole[:-1],
    "longer": lambda whole: whole + b"\0",
    "one bit": lambda whole: whole[:200] + bytes([whole[200] ^ 1]) + whole[201:],
    "a size of 4 GB": lambda whole: whole[:132] + b"\xff" * 4 + whole[136:],
}


@pytest.mark.parametrize("kind", OTHERS)
def test_nothing_but_what_was_published_is_read_by_scipy(kind, tmp_path, monkeypatch):
    write_svhn(tmp_path)
    monkeypatch.setattr(scipy.io, "loadmat", lambda *_, **__: pytest.fail("read"))
    path = tmp_path / "test_32x32.mat"
    path.write_bytes(OTHERS[kind](path.read_bytes()))
    with pytest.raises(DataError, match=r"test_32x32.mat: MD5 checksum .*--data.name folder"):
        read_mat(path)
