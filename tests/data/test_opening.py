import numpy as np
import pytest

from stochastic_depth.data import FolderBatches, TensorBatches, batches
from stochastic_depth.data.cifar import CIFAR10
from stochastic_depth.errors import DataError
from support.data_sets import write_binary, write_imagenet, write_svhn

SETTINGS = {"batch": 5, "seed": 0, "device": "cpu"}


@pytest.fixture
def cifar(tmp_path, pictures):
    labels = np.arange(20) % 10
    write_binary(tmp_path / "x", CIFAR10, pictures(20), labels, pictures(10), labels[:10])
    return tmp_path / "x"


def test_digits_and_svhn_are_not_augmented_and_cifar_is(cifar, tmp_path):
    write_svhn(tmp_path)
    made = {
        "digits": batches("digits", **SETTINGS),
        "cifar10": batches("cifar10", cifar, validation=10, **SETTINGS),
        "svhn": batches("svhn", tmp_path, validation=10, **SETTINGS),
    }
    assert all(isinstance(found, TensorBatches) for found in made.values())
    assert {name: found.augment for name, found in made.items()} == {
        "digits": False, "cifar10": True, "svhn": False,
    }  # fmt: skip
    assert batches("cifar10", cifar, validation=10, augment=False, **SETTINGS).augment is False


def test_every_option_arrives(cifar):
    found = batches("cifar10", cifar, batch=3, seed=7, device="cpu", validation=10, train=6)
    assert found.sizes == {"train": 6, "validation": 10, "test": 10}
    assert (found.steps_per_epoch, found.seed) == (2, 7)


def test_imagenet_is_read_from_its_folders(tmp_path):
    write_imagenet(tmp_path)
    found = batches("imagenet", tmp_path, validation=3, train=9, workers=1, **SETTINGS)
    assert isinstance(found, FolderBatches)
    assert found.sizes == {"train": 9, "validation": 3, "test": 9}
    assert (found.shape, found.workers) == ((3, 224, 224), 1)


def test_imagenet_cannot_be_downloaded_and_needs_a_root(tmp_path):
    with pytest.raises(DataError, match=r"image-net.org"):
        batches("imagenet", tmp_path, download=True, **SETTINGS)
    with pytest.raises(DataError, match="imagenet needs files"):
        batches("imagenet", **SETTINGS)
