import tarfile

import numpy as np
import pytest
import torchvision

from stochastic_depth.data import load
from stochastic_depth.data.cifar import CIFAR10
from stochastic_depth.errors import DataError
from support.data_sets import write_binary, write_pickles


def refuse(*_, **__):
    pytest.fail("fetched")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_without_a_way_to_the_files_the_error_says_what_to_fetch(name, tmp_path, no_network):
    part = "extra_32x32.mat" if name == "svhn" else "-python.tar.gz"
    with pytest.raises(DataError, match=f"{name} could not be fetched.*{part}.*by hand"):
        load(name, tmp_path / "new", download=True)


def test_nothing_is_fetched_that_is_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.utils, "download_url", refuse)
    with pytest.raises(DataError, match="no cifar10 found"):
        load("cifar10", tmp_path)


def test_nothing_is_fetched_that_is_there_in_any_layout(tmp_path, monkeypatch, pictures):
    monkeypatch.setattr(torchvision.datasets.utils, "download_url", refuse)
    labels = np.arange(20) % 10
    write_binary(tmp_path / "x", CIFAR10, pictures(20), labels, pictures(10), labels[:10])
    assert len(load("cifar10", tmp_path / "x", download=True, validation=10).train) == 10


def test_what_was_fetched_is_unpacked_and_read(tmp_path, monkeypatch, pictures):
    labels = np.arange(20) % 10
    made = tmp_path / "made" / "cifar-10-batches-py"
    write_pickles(made, CIFAR10, pictures(20), labels, pictures(10), labels[:10])

    def download(url, root, filename, md5):
        assert (root, md5) == (str(tmp_path / "new"), torchvision.datasets.CIFAR10.tgz_md5)
        with tarfile.open(tmp_path / "new" / filename, "w:gz") as archive:
            archive.add(made, made.name)

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", download)
    assert len(load("cifar10", tmp_path / "new", download=True, validation=10).train) == 10


def test_a_download_needs_a_folder():
    with pytest.raises(DataError, match=r"give --data\.root DIR"):
        load("cifar10", download=True)
