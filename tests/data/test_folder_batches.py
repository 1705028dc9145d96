import io
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from stochastic_depth import data
from stochastic_depth.data import Batches, FolderBatches, folder_batches
from stochastic_depth.errors import DataError
from stochastic_depth.processes import fresh_processes
from support.data_sets import IMAGENET_CLASSES, same_batches, write_imagenet
from support.decoding import batches_and_decoders

SIZE = 28
SETTINGS = {"batch": 4, "seed": 3, "device": "cpu", "workers": 0, "image_size": SIZE}


@pytest.fixture
def root(tmp_path):
    write_imagenet(tmp_path)
    return tmp_path


def made(root, **options) -> FolderBatches:
    return FolderBatches(root, **(SETTINGS | options))


@pytest.mark.parametrize("options", [{"size": 0}, {"size": -3}, {"workers": -1}])
def test_a_size_or_a_number_of_workers_below_the_least_is_refused(root, options):
    ((name, value),) = options.items()
    with pytest.raises(DataError, match=f"{name}={value}: give"):
        data.batches("folder", root, batch=4, seed=0, device="cpu", **options)


def test_it_is_what_training_needs(root):
    batches: Batches = made(root)
    assert batches.name == "imagenet"
    assert batches.classes == IMAGENET_CLASSES
    assert batches.shape == (3, SIZE, SIZE)
    assert batches.sizes == {"train": 21, "validation": 9, "test": 9}
    # 21 = 5 * 4 + 1: the last batch of one image is left out.
    assert batches.steps_per_epoch == 5
    found = list(batches.train(0))
    shapes = [(tuple(images.shape), images.dtype, len(y)) for images, y in found]
    assert shapes == [((4, 3, SIZE, SIZE), torch.float32, 4)] * 5
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in found)


def test_evaluation_scales_the_shorter_side_and_cuts_the_middle(root, monkeypatch):
    monkeypatch.setattr(folder_batches, "EVALUATION_BATCH", 4)
    found = torch.cat([images for images, _ in made(root).evaluate("test")])
    labels = torch.cat([labels for _, labels in made(root).evaluate("test")])
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for image, path in zip(found, sorted((root / "val").rglob("*.JPEG")), strict=True):
        original = Image.open(path)
        short = min(original.size)
        size = [int(side * 32 / short) for side in original.size]
        left, top = (round((side - SIZE) / 2) for side in size)
        scaled = original.resize(size, Image.Resampling.BILINEAR)
        middle = np.asarray(scaled.crop((left, top, left + SIZE, top + SIZE))) / 255
        expected = (middle - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        np.testing.assert_allclose(image, expected.transpose(2, 0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_default_device_of_pytorch_changes_nothing(workers, root):
    expected = list(made(root, validation=6).train(1)), list(made(root).evaluate("test"))
    torch.set_default_device("meta")  # as a GPU would be; its tensors have no values at all
    try:
        others = made(root, validation=6, workers=workers)
        found = list(others.train(1)), list(made(root, workers=workers).evaluate("test"))
    finally:
        torch.set_default_device(None)
    assert same_batches(found[0], expected[0])
    assert same_batches(found[1], expected[1])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_number_of_workers_does_not_change_the_batches(root):
    alone = list(made(root).train(1))
    assert same_batches(made(root, workers=2).train(1), alone)
    assert same_batches(made(root, workers=2).evaluate("test"), made(root).evaluate("test"))


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: where forking is safe")
def test_in_a_fresh_process_as_that_of_a_sweep_decoders_inherit_what_it_has_imported(root):
    fresh = fresh_processes("stochastic_depth.lab.sweep.workers")
    with ProcessPoolExecutor(1, fresh) as process:
        settings = SETTINGS | {"workers": 2}
        found, kinds = process.submit(batches_and_decoders, root, **settings).result()
    alone = [(images.numpy(), labels.numpy()) for images, labels in made(root).train(1)]
    for one, other in zip(found, alone, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])
    assert kinds == {"ForkProcess"}


def test_an_epoch_resumed_at_any_step_is_the_tail_of_the_whole(root):
    whole = list(made(root).train(2))
    for start in range(6):
        assert same_batches(made(root).train(2, start), whole[start:])


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_random_state_has_no_part_in_it_and_is_left_alone(root, workers):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    batches = made(root, workers=workers)
    first = list(batches.train(0)) + list(batches.evaluate("test"))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same_batches([*batches.train(0), *batches.evaluate("test")], first)


def test_epochs_and_seeds_have_their_own_order_and_views(root):
    first = list(made(root).train(0))
    assert not same_batches(made(root).train(1), first)
    assert not same_batches(made(root, seed=4).train(0), first)


def test_every_training_image_comes_once_with_its_label_and_without_augmentation_unchanged(root):
    batches = made(root, batch=7, augment=False)
    seen = torch.cat([images for images, _ in batches.train(0)])
    labels = torch.cat([labels for _, labels in batches.train(0)])
    assert labels.bincount().tolist() == [7, 7, 7]
    assert len({image.numpy().tobytes() for image in seen}) == 21
    again = torch.cat([images for images, _ in batches.train(1)])
    assert {image.numpy().tobytes() for image in again} == {
        image.numpy().tobytes() for image in seen
    }


def test_validation_images_can_be_held_out_of_the_training_images(root):
    batches = made(root, validation=6, train=9)
    assert batches.sizes == {"train": 9, "validation": 6, "test": 9}
    labels = torch.cat([labels for _, labels in batches.evaluate("validation")])
    assert labels.bincount().tolist() == [2, 2, 2]
    held = {path for path, _ in batches._samples["validation"]}
    assert not held & {path for path, _ in batches._samples["train"]}
    assert held == {path for path, _ in made(root, validation=6)._samples["validation"]}


@pytest.mark.parametrize("counts", [{"validation": 21}, {"validation": -1}, {"train": 22}])
def test_counts_that_do_not_fit_are_refused(root, counts):
    with pytest.raises(DataError, match="choose from 1 to 2"):
        made(root, **counts)


def test_the_fingerprint_sees_another_split_another_name_and_another_size(root):
    prints = {made(root).fingerprint, made(root).fingerprint}
    assert len(prints) == 1
    prints.add(made(root, validation=6).fingerprint)
    path = root / "train" / "n01" / "n01_0.JPEG"
    path.write_bytes(path.read_bytes() + b"\0")
    prints.add(made(root).fingerprint)
    path.rename(path.with_name("other.JPEG"))
    prints.add(made(root).fingerprint)
    assert len(prints) == 4


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_missing_folder_or_an_empty_class_is_named(root, part):
    (root / part / "n09").mkdir()
    with pytest.raises(DataError, match=f"{part}/n09: holds no pictures"):
        made(root)
    (root / part).rename(root / "elsewhere")
    with pytest.raises(DataError, match=f"{part}: expected one folder of pictures"):
        made(root)


def test_classes_that_differ_between_train_and_val_are_named(root):
    (root / "val" / "n02").rename(root / "val" / "n08")
    with pytest.raises(DataError, match="only in one of them: n02, n08"):
        made(root)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_is_named(root, workers):
    path = root / "val" / "n02" / "n02_1.JPEG"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match=r"n02_1.JPEG: no readable"):
        list(made(root, workers=workers).evaluate("test"))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("size", [(1, 1_000_000), (20_000_000, 4)])
def test_a_picture_like_a_hair_is_named(root, workers, size):
    path = root / "train" / "n02" / "n02_1.JPEG"
    Image.new("1", size).save(path, "PNG")
    shape = f"{size[0]}x{size[1]} pixels"
    with pytest.raises(DataError, match=rf"n02_1\.JPEG: an image of {shape}.*: crop it"):
        list(made(root, workers=workers).train(0))


def test_a_picture_that_claims_to_be_huge_is_not_decoded(root):
    file = io.BytesIO()
    Image.new("1", (9_000, 9_000)).save(file, "PNG")
    (root / "val" / "n02" / "n02_1.JPEG").write_bytes(file.getvalue())
    with pytest.raises(DataError, match=r"n02_1.JPEG: an image of 9000x9000 pixels"):
        list(made(root).evaluate("test"))
