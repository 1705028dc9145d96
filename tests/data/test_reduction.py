import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stochastic_depth.data import Images, load
from stochastic_depth.data.dataset import reduced
from stochastic_depth.errors import DataError


def images(side, count=3, channels=2, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, channels, side, side))
    return Images(torch.from_numpy(pixels).byte(), torch.arange(count))


@settings(deadline=None)
@given(size=st.integers(1, 6), times=st.integers(1, 5), seed=st.integers(0, 99))
def test_a_pixel_is_the_rounded_mean_of_the_area_it_covers(size, times, seed):
    whole = images(size * times, seed=seed)
    small = reduced("mine", whole, size).images.numpy()
    pixels = whole.images.numpy().astype(np.float64)
    for row in range(size):
        for column in range(size):
            rows, columns = (slice(i * times, (i + 1) * times) for i in (row, column))
            mean = pixels[:, :, rows, columns].mean((2, 3))
            assert np.array_equal(small[:, :, row, column], np.floor(mean + 0.5))


def test_labels_stay_and_the_full_size_changes_nothing():
    whole = images(6)
    assert torch.equal(reduced("mine", whole, 3).labels, whole.labels)
    assert torch.equal(reduced("mine", whole, 6).images, whole.images)


@pytest.mark.parametrize("size", [-2, 0, 5, 16])
def test_a_size_that_does_not_divide_the_side_is_refused(size):
    with pytest.raises(DataError, match=f"size={size}: the images of digits have 8x8 pixels"):
        load("digits", size=size)


def test_every_part_is_reduced_and_the_fingerprint_follows():
    small, whole = load("digits", size=4), load("digits")
    for part in small.parts:
        assert small.parts[part].images.shape[1:] == (1, 4, 4)
        assert torch.equal(small.parts[part].labels, whole.parts[part].labels)
    assert small.fingerprint != whole.fingerprint
    assert not torch.equal(small.std, whole.std)
