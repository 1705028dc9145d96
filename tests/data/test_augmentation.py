import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stochastic_depth.data import crop_and_flip, draw_crops, normalise


def test_normalise_subtracts_the_mean_and_divides_by_the_deviation_of_each_channel():
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 6), dtype=np.uint8)
    mean, std = np.array([0.1, 0.2, 0.3]), np.array([0.4, 0.5, 0.6])
    expected = (images / 255 - mean[:, None, None]) / std[:, None, None]
    found = normalise(
        torch.from_numpy(images), torch.from_numpy(mean).float(), torch.from_numpy(std).float()
    )
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def one_by_one(images, rows, columns, flips, padding):
    """The same on one image after the other, pixel by pixel."""
    _, _, height, width = images.shape
    result = np.zeros_like(images)
    for i, image in enumerate(images):
        for y in range(height):
            for x in range(width):
                source_y = y + rows[i] - padding
                source_x = (width - 1 - x if flips[i] else x) + columns[i] - padding
                if 0 <= source_y < height and 0 <= source_x < width:
                    result[i, :, y, x] = image[:, source_y, source_x]
    return result


@settings(deadline=None)
@given(
    batch=st.integers(1, 4),
    channels=st.integers(1, 3),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    padding=st.integers(0, 4),
    seed=st.integers(0, 2**16),
)
def test_a_batch_is_cropped_as_one_image_after_the_other(
    batch, channels, height, width, padding, seed
):
    images = torch.randn(
        batch, channels, height, width, generator=torch.Generator().manual_seed(seed)
    )
    rows, columns, flips = draw_crops(batch, padding, seed)
    expected = one_by_one(images.numpy(), rows, columns, flips, padding)
    np.testing.assert_array_equal(crop_and_flip(images, rows, columns, flips, padding), expected)


def test_the_middle_crop_changes_nothing():
    images = torch.arange(2 * 3 * 5 * 5.0).view(2, 3, 5, 5)
    middle, still = torch.full((2,), 4), torch.zeros(2, dtype=torch.bool)
    assert torch.equal(crop_and_flip(images, middle, middle, still, 4), images)


def test_the_memory_format_of_the_images_does_not_matter():
    images = torch.randn(6, 3, 8, 8)
    draw = draw_crops(6, 4, "key")
    there = crop_and_flip(images.contiguous(memory_format=torch.channels_last), *draw, 4)
    assert torch.equal(there, crop_and_flip(images, *draw, 4))


def test_every_offset_is_drawn_equally_often_and_half_of_the_images_are_flipped():
    rows, columns, flips = draw_crops(90_000, 4, "test")
    for offsets in (rows, columns):
        counts = offsets.bincount().double()
        assert len(counts) == 9
        # 8 degrees of freedom: 27.9 is the 0.0005 quantile of chi squared from above.
        assert ((counts - 10_000) ** 2 / 10_000).sum() < 27.9
    assert abs(flips.double().mean() - 0.5) < 0.006
    assert abs(torch.corrcoef(torch.stack([rows.double(), columns.double()]))[0, 1]) < 0.012


def test_a_draw_depends_on_its_key_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draw_crops(64, 4, "augment", 0, 3, 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = draw_crops(64, 4, "augment", 0, 3, 5), draw_crops(64, 4, "augment", 0, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
