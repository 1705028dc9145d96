from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stochastic_depth.data import (
    Batches,
    DataSet,
    Images,
    TensorBatches,
    batching,
    crop_and_flip,
    draw_crops,
)
from stochastic_depth.errors import DataError
from support.data_sets import same_batches


def numbered(n, start=0):
    """Images that tell their own number: the red channel holds it, the label too (mod 10)."""
    number = torch.arange(start, start + n)
    images = torch.randint(256, (n, 3, 6, 5), generator=torch.Generator().manual_seed(n))
    images[:, 0] = number[:, None, None]
    return Images(images.byte(), number % 10)


def data(train=53):
    return DataSet(
        "mine", tuple("abcdefghij"), numbered(train), numbered(12, 100), numbered(23, 200)
    )


def made(train=53, **options) -> TensorBatches:
    settings = {"batch": 8, "augment": True, "seed": 3, "device": "cpu"}
    return TensorBatches(data(train), **(settings | options))


def numbers(images, of):
    """The number of each image, from its normalised red channel."""
    return (images[:, 0, 3, 2] * of.std[0] + of.mean[0]).mul(255).round().int().tolist()


def test_it_is_what_training_needs():
    batches: Batches = made()
    assert batches.shape == (3, 6, 5)
    assert batches.sizes == {"train": 53, "validation": 12, "test": 23}
    assert batches.steps_per_epoch == 7
    assert batches.fingerprint == data().fingerprint
    assert (batches.name, batches.classes) == ("mine", tuple("abcdefghij"))


def test_every_image_comes_once_per_epoch_with_its_label():
    batches = made(augment=False)
    for epoch in range(3):
        seen = []
        for images, labels in batches.train(epoch):
            assert images.dtype == torch.float32
            assert labels.dtype == torch.int64
            found = numbers(images, data())
            assert [number % 10 for number in found] == labels.tolist()
            seen.append(found)
        assert [len(batch) for batch in seen] == [8] * 6 + [5]
        assert sorted(chain(*seen)) == list(range(53))


def test_a_last_batch_of_one_image_is_left_out():
    batches = made(train=49)
    assert batches.steps_per_epoch == 6
    assert [len(labels) for _, labels in batches.train(0)] == [8] * 6


def test_batches_of_one_image_are_allowed_where_they_are_asked_for():
    assert made(train=3, batch=1).steps_per_epoch == 3


@pytest.mark.parametrize(("train", "batch"), [(2, 0), (2, -1)])
def test_a_batch_without_images_is_refused(train, batch):
    with pytest.raises(DataError, match=f"batch={batch}: a batch has at least one image"):
        made(train, batch=batch)


def test_one_training_image_is_too_few():
    with pytest.raises(DataError, match="1 training images are too few for a batch of 8"):
        made(train=1)


def test_images_are_normalised_then_cropped_and_flipped():
    batches, plain = made(), made(augment=False)
    steps = list(zip(batches.train(2), plain.train(2), strict=True))
    for step, ((images, labels), (before, same_labels)) in enumerate(steps):
        assert torch.equal(labels, same_labels)
        draw = draw_crops(len(labels), 1, "augment", 3, 2, step)
        assert torch.equal(images, crop_and_flip(before, *draw, 1))


@pytest.mark.parametrize(("height", "padding"), [(32, 4), (16, 2), (6, 1)])
def test_images_are_padded_by_an_eighth_of_their_height(height, padding):
    pixels = torch.full((9, 1, height, height), 200, dtype=torch.uint8)
    pixels[0] = 100  # for a deviation
    part = Images(pixels, torch.zeros(9, dtype=torch.int64))
    whole = DataSet("mine", ("a", "b"), part, part, part)
    widest = 0
    for epoch in range(40):
        batches = TensorBatches(whole, batch=9, augment=True, seed=0, device="cpu")
        for images, _ in batches.train(epoch):
            empty = (images == 0).all(3)  # rows of border alone
            widest = max(widest, int(empty.sum(2).max()))
    assert widest == padding


def test_normalised_training_images_have_mean_zero_and_deviation_one():
    images = torch.cat([images for images, _ in made(augment=False).train(0)]).double()
    np.testing.assert_allclose(images.mean((0, 2, 3)), np.zeros(3), atol=1e-6)
    np.testing.assert_allclose(images.std((0, 2, 3), correction=0), np.ones(3), atol=1e-6)


@settings(deadline=None)
@given(epoch=st.integers(0, 5), start=st.integers(0, 8), augment=st.booleans())
def test_an_epoch_resumed_at_any_step_is_the_tail_of_the_whole(epoch, start, augment):
    whole = list(made(augment=augment).train(epoch))
    assert same_batches(made(augment=augment).train(epoch, start), whole[start:])


def test_epochs_and_seeds_have_their_own_order_and_the_global_state_has_no_part():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = list(made().train(0))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same_batches(made().train(0), first)
    assert not same_batches(made().train(1), first)
    assert not same_batches(made(seed=4).train(0), first)


def test_evaluation_keeps_the_order_and_every_image(monkeypatch):
    monkeypatch.setattr(batching, "EVALUATION_BATCH", 10)
    batches = made()
    for part, start, n in (("validation", 100, 12), ("test", 200, 23)):
        seen = [(numbers(images, data()), labels) for images, labels in batches.evaluate(part)]
        assert list(chain(*(found for found, _ in seen))) == list(range(start, start + n))
        assert torch.cat([labels for _, labels in seen]).tolist() == [
            number % 10 for number in range(start, start + n)
        ]
        assert max(len(labels) for _, labels in seen) == 10


@pytest.mark.parametrize("augment", [False, True])
def test_images_are_channels_last(augment):
    batches = made(augment=augment)
    for images, _ in [*batches.train(0), *batches.evaluate("test")]:
        assert images.is_contiguous(memory_format=torch.channels_last)
