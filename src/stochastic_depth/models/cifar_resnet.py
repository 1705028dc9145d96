"""The residual network of 6n + 2 layers for 32x32 images.

He et al. 2015 (arXiv:1512.03385, section 4.2), with the shortcuts of the stochastic depth paper:
where the resolution halves, average pooling and padding with zero channels, so that no shortcut has
a parameter and the transition blocks can be dropped too.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stochastic_depth.errors import ConfigError
from stochastic_depth.models.initialisation import Initialisation, initialise
from stochastic_depth.residual import Residual

WIDTHS = (16, 32, 64)


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
    """[batch, channels, height, width] -> logits [batch, classes].

    Args:
        depth: 6n + 2 weighted layers in n blocks for each of three resolutions; the paper's are
            110 (1.7 M parameters), 152 and 1202 (19.4 M).
        classes: number of classes.
        channels: of the input image.
        init: "zero-gain" or "he", see `initialise`.
        seed: chooses the initial weights.

    Raises:
        ConfigError: when depth is not 6n + 2.
    """

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
        widths = [WIDTHS[0], *(width for width in WIDTHS for _ in range(n))]
        with torch.device("meta"):
            self.stem = nn.Sequential(
                nn.Conv2d(channels, WIDTHS[0], 3, padding=1, bias=False),
                nn.BatchNorm2d(WIDTHS[0]),
                nn.ReLU(inplace=True),
            )
            self.blocks = nn.Sequential(
                *(basic_block(before, after) for before, after in pairwise(widths))
            )
            self.head = nn.Linear(WIDTHS[-1], classes)
        initialise(self, init, seed)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.head(x.mean((2, 3)))
