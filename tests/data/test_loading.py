import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import stochastic_depth.data
from stochastic_depth.data import Images, batches, load
from stochastic_depth.data.cifar import CIFAR10
from stochastic_depth.data.dataset import reduced
from stochastic_depth.errors import DataError, MissingExtraError
from support.data_sets import write_parquet


def as_set(part):
    return {image.tobytes() for image in part.images.numpy()}


def test_the_validation_images_do_not_depend_on_how_many_are_trained_on():
    small, whole = load("digits", train=50), load("digits")
    assert torch.equal(small.validation.images, whole.validation.images)
    assert torch.equal(small.test.images, whole.test.images)
    assert len(small.train) == 50
    assert as_set(small.train) <= as_set(whole.train)
    assert small.train.labels.bincount().tolist() == [5] * 10
    assert small.fingerprint != whole.fingerprint


@pytest.fixture
def other_default_device():
    torch.set_default_device("meta")  # as a GPU would be; its tensors have no values at all
    yield
    torch.set_default_device(None)


def test_the_default_device_of_pytorch_changes_nothing(other_default_device):
    def first():
        images = batches("digits", batch=64, seed=1, device="cpu", augment=True, train=300)
        return [*next(images.train(2)), *next(images.evaluate("validation")), images.mean]

    found = first()
    torch.set_default_device(None)
    assert all(torch.equal(mine, other) for mine, other in zip(found, first(), strict=True))


def test_mean_and_std_are_of_what_is_trained_on():
    small = load("digits", train=50, validation=300)
    pixels = small.train.images.double() / 255
    torch.testing.assert_close(small.mean.double(), pixels.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        small.std.double(), pixels.std((0, 2, 3), correction=0), rtol=1e-6, atol=0
    )


def test_all_the_training_images_may_be_asked_for_by_number():
    assert load("digits", train=1197).fingerprint == load("digits").fingerprint


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"validation": 0}, "validation=0: choose from 1 to 1296 training images"),
        ({"validation": 1297}, "validation=1297"),
        ({"validation": -5}, "validation=-5"),
        ({"train": 0}, "train=0: choose from 1 to 1197"),
        ({"train": 1198}, "train=1198: choose from 1 to 1197"),
    ],
)
def test_counts_that_do_not_fit_are_refused(counts, message):
    with pytest.raises(DataError, match=message) as caught:
        load("digits", **counts)
    assert isinstance(caught.value, ValueError)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(
        DataError,
        match="no data set 'cifar' that can be loaded into memory: choose from digits, cifar10, "
        "cifar100, svhn;",
    ):
        load("cifar")
    with pytest.raises(DataError, match=r"no data set 'cifar': choose from .*imagenet, folder$"):
        batches("cifar", batch=8, seed=0, device="cpu")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_a_data_set_with_files_needs_a_root(name, tmp_path):
    with pytest.raises(DataError, match=rf"{name} needs files: give --data\.root DIR"):
        load(name)
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'none'}: does not exist")):
        load(name, tmp_path / "none")


def test_the_package_imports_no_optional_library_by_itself():
    folder = Path(stochastic_depth.data.__file__).parent
    for path in folder.rglob("*.py"):
        for line in path.read_text().splitlines():
            found = re.match(r"(?:import|from) (\w+)", line)
            assert not found or found[1] not in {
                "numpy", "PIL", "pyarrow", "scipy", "sklearn", "torchvision",
            }, path  # fmt: skip


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("digits", "sklearn", "scikit-learn"),
        ("cifar10", "pyarrow.parquet", "pyarrow"),
        ("cifar10", "PIL.Image", "pillow"),
    ],
)
def test_a_missing_library_is_one_sentence_with_the_command(
    name, module, package, tmp_path, pictures, monkeypatch
):
    labels = np.arange(20) % 10
    write_parquet(tmp_path, CIFAR10, pictures(20), labels, pictures(10), labels[:10])
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"{module} .*pip install .*{package}>="):
        load(name, None if name == "digits" else tmp_path)


def test_the_real_cifar_10_is_what_its_authors_published(real_cifar10_root, no_network):
    data = load("cifar10", real_cifar10_root)
    assert (len(data.train), len(data.validation), len(data.test)) == (45_000, 5_000, 10_000)
    assert data.validation.labels.bincount().tolist() == [500] * 10
    assert data.test.labels.bincount().tolist() == [1_000] * 10
    images = torch.cat([data.train.images, data.validation.images])
    labels = torch.cat([data.train.labels, data.validation.labels])
    assert labels.bincount().tolist() == [5_000] * 10
    counts = np.stack([np.bincount(images[:, i].numpy().ravel(), minlength=256) for i in range(3)])
    values, pixels = np.arange(256) / 255, 50_000 * 32 * 32
    mean = counts @ values / pixels
    std = np.sqrt(counts @ values**2 / pixels - mean**2)
    assert mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=6e-5)
    assert std == pytest.approx((0.2470, 0.2435, 0.2616), abs=6e-5)
    some = Images(data.train.images[:500], data.train.labels[:500])
    halves = some.images.double().reshape(500, 3, 16, 2, 16, 2).mean((3, 5))
    assert (reduced("cifar10", some, 16).images - halves).abs().max() <= 0.5
    # Decoding and the choice of the validation images never change between versions.
    assert data.fingerprint.startswith("e81f4617ce9095bc78a963f74afd2a97")
