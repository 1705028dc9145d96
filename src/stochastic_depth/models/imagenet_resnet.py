"""The residual networks of 50, 101 and 152 layers for 224x224 images.

He et al. 2015 (arXiv:1512.03385, table 1), with the stride of a bottleneck on its 3x3 convolution
as every current library has it. The stochastic depth paper's ImageNet network is the one of 152.
"""

import torch
from torch import Tensor, nn

from stochastic_depth.errors import ConfigError
from stochastic_depth.models.initialisation import Initialisation, initialise
from stochastic_depth.residual import Residual

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
"""depth -> number of bottlenecks at each of the four resolutions."""

WIDTHS = (64, 128, 256, 512)
EXPANSION = 4


def bottleneck(channels_in: int, width: int, stride: int) -> Residual:
    """1x1, 3x3 and 1x1 convolutions, [b, channels_in, h, w] -> [b, 4 width, h/stride, w/stride].

    Where the shape changes the shortcut is a 1x1 convolution with batch normalisation. It is not
    part of the branch: it runs, and learns, when the branch is skipped.
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
    """[batch, 3, height, width] -> logits [batch, classes].

    Blocks are numbered over the whole network, in order of execution: 16, 33 or 50 of them.

    Args:
        depth: 50 (25.6 M parameters), 101 (44.5 M) or 152 (60.2 M).
        classes: number of classes.
        init: "zero-gain" or "he", see `initialise`.
        seed: chooses the initial weights.

    Raises:
        ConfigError: when depth is another.
    """

    def __init__(
        self,
        depth: int = 50,
        classes: int = 1000,
        init: Initialisation = "zero-gain",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise ConfigError(f"depth={depth}: an ImageNet ResNet has 50, 101 or 152 layers")
        blocks: list[Residual] = []
        with torch.device("meta"):
            self.stem = nn.Sequential(
                nn.Conv2d(3, WIDTHS[0], 7, stride=2, padding=3, bias=False),
                nn.BatchNorm2d(WIDTHS[0]),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(3, stride=2, padding=1),
            )
            channels = WIDTHS[0]
            for stage, (width, count) in enumerate(zip(WIDTHS, BLOCKS[depth], strict=True)):
                for block in range(count):
                    stride = 2 if stage > 0 and block == 0 else 1
                    blocks.append(bottleneck(channels, width, stride))
                    channels = EXPANSION * width
            self.blocks = nn.Sequential(*blocks)
            self.head = nn.Linear(channels, classes)
        initialise(self, init, seed)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.head(x.mean((2, 3)))
