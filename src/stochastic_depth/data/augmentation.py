"""Normalise, crop and flip a whole batch at once, where the batch lives."""

import torch
from torch import Tensor

from stochastic_depth.randomness import generator


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(images / 255 - mean) / std, channel by channel.

    images: uint8 [batch, channels, height, width]; mean, std: float32 [channels], of pixel values
    in 0..1. Returns float32 of the images' shape and memory format.
    """
    return (images / 255).sub_(mean[:, None, None]).div_(std[:, None, None])


def draw_crops(batch: int, padding: int, *key: int | str) -> tuple[Tensor, Tensor, Tensor]:
    """Where `crop_and_flip` cuts, as a pure function of `key`.

    Returns rows and columns, int64 [batch], uniform in 0..2 * padding, and flips, bool [batch],
    true with probability 1/2: on the CPU, so that the numbers are the same for every device.
    """
    source = generator(*key)
    rows, columns = torch.randint(2 * padding + 1, (2, batch), generator=source)
    flips = torch.randint(2, (batch,), generator=source).bool()
    return rows, columns, flips


def crop_and_flip(
    images: Tensor, rows: Tensor, columns: Tensor, flips: Tensor, padding: int
) -> Tensor:
    """Surround each image by `padding` zeros, cut a window of its own size, mirror some of them.

    The standard augmentation of CIFAR (paper, section 4; the authors' code pads after it
    normalises, so the border is the mean colour, not black).

    images: [batch, channels, height, width]; rows, columns: [batch], the window's upper left
    corner in the padded image; flips: bool [batch], mirror left and right. All on one device.
    Returns a tensor of the images' shape.
    """
    batch, channels, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    down = torch.arange(height, device=images.device)
    across = torch.arange(width, device=images.device).expand(batch, width)
    across = torch.where(flips[:, None], width - 1 - across, across)
    down, across = rows[:, None] + down, columns[:, None] + across
    window = (down[:, :, None] * padded.shape[3] + across[:, None, :]).view(batch, 1, -1)
    pixels = padded.flatten(2).gather(2, window.expand(batch, channels, height * width))
    return pixels.view(images.shape)
