"""Smaller images, for runs that take minutes."""

from stochastic_depth.data.dataset import Images
from stochastic_depth.errors import DataError


def reduced(name: str, part: Images, size: int) -> Images:
    """`part` with every image reduced to `size` pixels a side by averaging areas.

    A pixel is the mean of those it covers, in whole numbers, halves rounded up: the same on every
    machine.

    Raises:
        DataError: images that are not square, or whose side is no multiple of `size`.
    """
    count, channels, height, width = part.images.shape
    if height != width or height % size:
        raise DataError(
            f"size={size}: the images of {name} have {height}x{width} pixels, choose a divisor of "
            "their side"
        )
    area = (height // size) ** 2
    blocks = part.images.view(count, channels, size, height // size, size, width // size)
    means = (blocks.sum((3, 5)) + area // 2) // area
    return Images(means.byte(), part.labels)
