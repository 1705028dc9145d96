from typing import get_args

import pytest

from stochastic_depth.choices import DataName
from stochastic_depth.data import batches, load
from stochastic_depth.data.cifar import CIFAR100
from stochastic_depth.data.sources import SOURCES
from stochastic_depth.errors import DataError
from support.data_sets import write_binary, write_svhn


def test_every_data_set_that_can_be_chosen_has_a_source():
    assert tuple(SOURCES) == get_args(DataName)


def test_images_have_the_size_that_the_source_says(tmp_path, pictures):
    labels = list(range(100))
    write_binary(tmp_path / "x", CIFAR100, pictures(100), labels, pictures(100), labels)
    (tmp_path / "svhn").mkdir()
    write_svhn(tmp_path / "svhn")
    found = {
        "digits": load("digits"),
        "cifar100": load("cifar100", tmp_path / "x", validation=10),
        "svhn": load("svhn", tmp_path / "svhn", validation=10),
    }
    for name, data in found.items():
        assert data.train.images.shape[2:] == (SOURCES[name].side,) * 2
        assert data.name == name


@pytest.mark.parametrize("name", ["imagenet", "folder"])
def test_what_cannot_be_downloaded_is_not_offered_for_download(name):
    with pytest.raises(DataError, match=r"the folder with train/CLASS/ and val/CLASS/$"):
        batches(name, batch=5, seed=0, device="cpu")
