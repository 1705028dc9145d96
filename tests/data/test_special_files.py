"""Pipes, devices and links among the files of a data set: shown, and never waited for."""

import numpy as np
import pytest

from stochastic_depth.data import batches, load
from stochastic_depth.data.cifar import CIFAR10
from stochastic_depth.errors import DataError
from support.data_sets import write_cifar, write_imagenet, write_svhn
from support.special_files import put

LABELS = np.arange(20) % 10


def written(root, layout, pictures):
    """A data set in `root`; the file of it that is to be replaced."""
    if layout == "svhn":
        write_svhn(root)
        return root / "extra_32x32.mat"
    return write_cifar(layout, root, CIFAR10, pictures(20), LABELS, pictures(10), LABELS[:10])


@pytest.mark.parametrize("kind", ["pipe", "device", "link to nowhere"])
@pytest.mark.parametrize("layout", ["pickles", "binary", "parquet", "folders", "svhn"])
def test_a_special_file_is_told(tmp_path, layout, kind, pictures):
    path = written(tmp_path, layout, pictures)
    path.unlink()
    put(path, kind, tmp_path / "file")
    with pytest.raises(DataError, match=path.name):
        load("svhn" if layout == "svhn" else "cifar10", tmp_path, validation=2)


@pytest.mark.parametrize("layout", ["pickles", "binary", "parquet", "folders", "svhn"])
def test_files_that_are_linked_are_read(tmp_path, layout, pictures):
    path = written(tmp_path, layout, pictures)
    name = "svhn" if layout == "svhn" else "cifar10"
    before = load(name, tmp_path, validation=2).fingerprint
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert load(name, tmp_path, validation=2).fingerprint == before


@pytest.mark.parametrize("kind", ["pipe", "device", "link to nowhere"])
def test_a_special_file_in_a_tree_of_pictures_is_told(tmp_path, kind):
    write_imagenet(tmp_path)
    path = next((tmp_path / "train").rglob("*.JPEG"))
    path.unlink()
    put(path, kind, tmp_path / "file")
    tree = batches(
        "imagenet", tmp_path, batch=50, seed=0, device="cpu", size=32, workers=0, augment=False
    )
    with pytest.raises(DataError, match=path.name):
        list(tree.train(0))
