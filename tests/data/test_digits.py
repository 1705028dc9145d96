import numpy as np
import pytest
from sklearn.datasets import load_digits

from stochastic_depth.data import load
from stochastic_depth.errors import DataError


def test_digits_need_no_files_and_have_a_fixed_split():
    data = load("digits")
    assert (len(data.train), len(data.validation), len(data.test)) == (1197, 100, 500)
    assert data.train.images.shape[1:] == (1, 8, 8)
    assert data.classes == tuple("0123456789")
    assert data.fingerprint == load("digits").fingerprint
    for part in (data.train, data.validation, data.test):
        counts = part.labels.bincount()
        assert counts.max() - counts.min() <= 0.05 * len(part)


def test_the_three_parts_are_scikit_learn_s_digits_scaled_to_255():
    data, digits = load("digits"), load_digits()
    parts = (data.train, data.validation, data.test)
    found = sorted(
        (image.tobytes(), int(label))
        for part in parts
        for image, label in zip(part.images.numpy(), part.labels, strict=True)
    )
    pixels = np.array([round(value * 255 / 16) for value in range(17)], np.uint8)
    expected = pixels[digits.images.astype(int)]
    assert found == sorted(
        (image.tobytes(), int(label)) for image, label in zip(expected, digits.target, strict=True)
    )


def test_a_root_for_digits_is_refused(tmp_path):
    with pytest.raises(DataError, match="digits comes with scikit-learn"):
        load("digits", tmp_path)
