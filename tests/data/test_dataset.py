import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from stochastic_depth.data import DataSet, Images
from stochastic_depth.errors import DataError


def some_images(n, seed=0, classes=3, shape=(3, 4, 4)):
    source = torch.Generator().manual_seed(seed)
    return Images(
        torch.randint(256, (n, *shape), dtype=torch.uint8, generator=source),
        torch.randint(classes, (n,), generator=source),
    )


def a_set(**parts):
    default = {"train": some_images(20, 1), "validation": some_images(5, 2)}
    default["test"] = some_images(6, 3)
    return DataSet("mine", ("a", "b", "c"), **(default | parts))


def test_mean_and_std_are_those_of_the_training_part_alone():
    data = a_set()
    pixels = data.train.images.numpy() / 255
    assert data.mean.dtype == data.std.dtype == torch.float32
    np.testing.assert_allclose(data.mean, pixels.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(data.std, pixels.std((0, 2, 3)), rtol=1e-6)
    assert torch.equal(a_set(test=some_images(6, 9)).mean, data.mean)


def test_a_channel_with_one_value_is_refused_where_it_is_needed():
    black = some_images(20)
    black.images[:, 1] = 7
    data = a_set(train=black)
    with pytest.raises(DataError, match="one value everywhere"):
        _ = data.std


def test_the_fingerprint_is_sha256_over_names_pixels_and_labels():
    data = a_set()
    expected = hashlib.sha256(repr(data.classes).encode())
    for name in ("train", "validation", "test"):
        part = getattr(data, name)
        expected.update(repr((name, tuple(part.images.shape))).encode())
        expected.update(part.images.numpy().tobytes() + part.labels.numpy().tobytes())
    assert data.fingerprint == expected.hexdigest()


def test_the_fingerprint_sees_one_pixel_one_label_and_one_name():
    prints = {a_set().fingerprint, a_set().fingerprint}
    assert len(prints) == 1
    pixel, label = some_images(6, 3), some_images(6, 3)
    pixel.images[5, 2, 3, 3] ^= 1
    label.labels[0] = (label.labels[0] + 1) % 3
    prints |= {a_set(test=pixel).fingerprint, a_set(test=label).fingerprint}
    data = a_set()
    renamed = DataSet("mine", ("a", "b", "d"), data.train, data.validation, data.test)
    assert len(prints | {renamed.fingerprint}) == 4


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2).long(), "must be uint8"),
        (torch.zeros(2, 4, 4).byte(), torch.zeros(2).long(), "must be uint8"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(3).long(), r"must be int64 \[2\]"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(2), r"must be int64 \[2\]"),
    ],
)
def test_images_of_a_wrong_type_or_number_are_refused(images, labels, message):
    with pytest.raises(DataError, match=message):
        Images(images, labels)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"validation": some_images(0)}, "validation part of mine is empty"),
        ({"test": some_images(3, shape=(3, 5, 4))}, r"test part of mine are \[3, 5, 4\]"),
        ({"train": some_images(9, classes=4)}, "labels in the train part .* 0 to 3"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(parts, message):
    with pytest.raises(DataError, match=message):
        a_set(**parts)


def test_one_class_is_refused():
    with pytest.raises(DataError, match=r"has the classes \['one'\]: a classifier needs two"):
        replace(a_set(), classes=("one",))
