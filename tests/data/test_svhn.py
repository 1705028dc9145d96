import numpy as np
import pytest
import scipy.io
import torch
from written import write_svhn

from stochastic_depth.data import Images, load
from stochastic_depth.data.svhn import SvhnFiles, hold_out_svhn, read_svhn
from stochastic_depth.errors import DataError


@pytest.mark.parametrize("compressed", [False, True])
def test_the_three_files_are_read_and_ten_means_zero(compressed, tmp_path):
    made = write_svhn(tmp_path, do_compression=compressed)
    files = read_svhn(tmp_path)
    for part, (pixels, digits) in made.items():
        found = getattr(files, part)
        np.testing.assert_array_equal(found.images, pixels.transpose(0, 3, 1, 2))
        np.testing.assert_array_equal(found.labels, digits)


def test_by_default_400_of_each_class_come_from_train_and_200_from_extra():
    def part(n, mark):
        labels = torch.arange(n) % 10
        images = torch.full((n, 3, 1, 1), mark, dtype=torch.uint8)
        return Images(images, labels)

    files = SvhnFiles(part(4_500, 0), part(2_700, 1), part(10, 2))
    kept, held = hold_out_svhn(files, 6_000)
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"X": X}, "arrays X, expected X and y"),
        ({"y": Y}, "arrays y, expected X and y"),
        ({}, "arrays none, expected X and y"),
        ({"X": X.astype(float), "y": Y}, r"X is torch.float64 \[32, 32, 3, 4\], expected uint8"),
        ({"X": X[:31], "y": Y}, r"X is torch.uint8 \[31, 32, 3, 4\]"),
        ({"X": X, "y": Y[:3]}, "4 images and 3 labels"),
        ({"X": X[..., :0], "y": Y[:0]}, "0 images|no readable|X is"),
        ({"X": X, "y": Y * 11}, "image 0: label 11, expected 1 to 10"),
        ({"X": X, "y": Y * 0}, "image 0: label 0, expected 1 to 10"),
        ({"X": X, "y": Y * float("nan")}, "image 0: label nan"),
        ({"X": X, "y": Y * 1.5}, "image 0: label 1.5"),
        ({"X": X, "y": np.array([["a"]] * 4, dtype=object)}, "arrays X, expected X and y"),
    ],
)
def test_a_file_with_other_content_is_refused(content, message, tmp_path):
    write_svhn(tmp_path)
    scipy.io.savemat(tmp_path / "extra_32x32.mat", content)
    with pytest.raises(DataError, match=f"extra_32x32.mat.*{message}"):
        read_svhn(tmp_path)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(share, tmp_path):
    write_svhn(tmp_path)
    path = tmp_path / "test_32x32.mat"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(DataError, match=r"test_32x32.mat"):
        read_svhn(tmp_path)
