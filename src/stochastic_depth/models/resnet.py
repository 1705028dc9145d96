"""The residual networks of the paper: for CIFAR and SVHN, and for ImageNet.

The network for 32x32 images has 6n + 2 layers (He et al. 2015, arXiv:1512.03385, section 4.2), with
the shortcuts of the stochastic depth paper. Where the resolution halves, the shortcut is average
pooling and padding with zero channels. So no shortcut has a parameter, and the transition blocks
can be dropped too.
"""

from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stochastic_depth.choices import Initialisation
from stochastic_depth.errors import ConfigError
from stochastic_depth.models.initialisation import initialise
from stochastic_depth.residual import Residual

CIFAR_WIDTHS = (16, 32, 64)


class PoolAndPad(nn.Module):
    """Halve the resolution and append zero channels: [b, c, h, w] -> [b, channels, h/2, w/2]."""

    def __init__(self, added: int) -> None:
        super().__init__()
        self.added = added

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 0, self.added))


def basic_block(channels_in: int, channels: int) -> Residual:
    """Two 3x3 convolutions around a shortcut; the first halves the resolution at a transition."""
    transition = channels != channels_in
    return Residual(
        branch=nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, 1 + transition, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        ),
        shortcut=PoolAndPad(channels - channels_in) if transition else None,
        activation=nn.ReLU(),
    )


class CifarResNet(nn.Module):
    """A ResNet for small images: [batch, channels, height, width] -> logits [batch, classes].

    Args:
        depth: 6n + 2 weighted layers, in n blocks for each of three resolutions; in the paper 110
            (1.7 M parameters), 152 and 1202 (19.4 M).
        classes: number of classes.
        channels: number of channels of the input image.
        init: "zero-gain" or "he", see `initialise`.
        seed: chooses the initial weights.

    Raises:
        ConfigError: when depth is not 6n + 2.
    """

    family: ClassVar = "ResNet"
    """The name of the network before its depth, in tables."""

    def __init__(
        self,
        depth: int = 110,
        classes: int = 10,
        channels: int = 3,
        init: Initialisation = "zero-gain",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ConfigError(f"depth={depth}: a CIFAR ResNet has 6n + 2 layers: 20, 32, 56, 110")
        n = (depth - 2) // 6
        widths = [CIFAR_WIDTHS[0], *(width for width in CIFAR_WIDTHS for _ in range(n))]
        with torch.device("meta"):
            self.stem = nn.Sequential(
                nn.Conv2d(channels, CIFAR_WIDTHS[0], 3, padding=1, bias=False),
                nn.BatchNorm2d(CIFAR_WIDTHS[0]),
                nn.ReLU(inplace=True),
            )
            self.blocks = nn.Sequential(
                *(basic_block(before, after) for before, after in pairwise(widths))
            )
            self.head = nn.Linear(CIFAR_WIDTHS[-1], classes)
        initialise(self, init, seed)

    @staticmethod
    def takes(height: int, width: int) -> bool:
        """Whether the network accepts images with that many pixels."""
        # Branch and shortcut would round the half of an odd side differently.
        return height % 4 == width % 4 == 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.head(x.mean((2, 3)))


IMAGENET_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
"""The number of bottleneck blocks at each of the four resolutions, by depth."""

IMAGENET_WIDTHS = (64, 128, 256, 512)
EXPANSION = 4


def bottleneck(channels_in: int, width: int, stride: int) -> Residual:
    """1x1, 3x3 and 1x1 convolutions, [b, channels_in, h, w] -> [b, 4 width, h/stride, w/stride].

    Where the shape changes, the shortcut is a 1x1 convolution with batch normalisation. It is not
    part of the branch, so it runs and learns even when the branch is skipped.
    """
    channels = EXPANSION * width
    projection = None
    if channels_in != channels or stride != 1:
        projection = nn.Sequential(
            nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
        )
    return Residual(
        branch=nn.Sequential(
            nn.Conv2d(channels_in, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        ),
        shortcut=projection,
        activation=nn.ReLU(),
    )


class ImageNetResNet(nn.Module):
    """A ResNet for ImageNet: [batch, channels, height, width] -> logits [batch, classes].

    Blocks are numbered over the whole network in the order of execution: 16, 33 or 50 of them.

    Args:
        depth: 50 (25.6 M parameters), 101 (44.5 M) or 152 (60.2 M).
        classes: number of classes.
        channels: number of channels of the input image.
        init: "zero-gain" or "he", see `initialise`.
        seed: chooses the initial weights.

    Raises:
        ConfigError: when depth is not one of these.
    """

    family: ClassVar = "ResNet"
    """The name of the network before its depth, in tables."""

    def __init__(
        self,
        depth: int = 50,
        classes: int = 1000,
        channels: int = 3,
        init: Initialisation = "zero-gain",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if depth not in IMAGENET_BLOCKS:
            raise ConfigError(f"depth={depth}: an ImageNet ResNet has 50, 101 or 152 layers")
        blocks: list[Residual] = []
        with torch.device("meta"):
            self.stem = nn.Sequential(
                nn.Conv2d(channels, IMAGENET_WIDTHS[0], 7, stride=2, padding=3, bias=False),
                nn.BatchNorm2d(IMAGENET_WIDTHS[0]),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(3, stride=2, padding=1),
            )
            width_in = IMAGENET_WIDTHS[0]
            for stage, (width, count) in enumerate(
                zip(IMAGENET_WIDTHS, IMAGENET_BLOCKS[depth], strict=True)
            ):
                for block in range(count):
                    stride = 2 if stage > 0 and block == 0 else 1
                    blocks.append(bottleneck(width_in, width, stride))
                    width_in = EXPANSION * width
            self.blocks = nn.Sequential(*blocks)
            self.head = nn.Linear(width_in, classes)
        initialise(self, init, seed)

    @staticmethod
    def takes(height: int, width: int) -> bool:
        """Whether the network accepts images with that many pixels."""
        return min(height, width) >= 1

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.head(x.mean((2, 3)))
