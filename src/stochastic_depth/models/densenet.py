"""The densely connected network for 32x32 images, the follow-up of the stochastic depth paper.

Huang, Liu, van der Maaten and Weinberger 2017 (arXiv:1608.06993, section 3). Every layer reads the
feature maps of all layers before it at its resolution, so nothing bypasses a layer. There is no
residual unit, and `sd.apply` raises an error that says so.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from stochastic_depth.errors import ConfigError
from stochastic_depth.models.initialisation import initialise


def composite(channels_in: int, channels: int, kernel: int) -> nn.Sequential:
    """H_l of the paper: batch normalisation, ReLU and a convolution that keeps the resolution."""
    return nn.Sequential(
        nn.BatchNorm2d(channels_in),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels_in, channels, kernel, padding=kernel // 2, bias=False),
    )


class DenseLayer(nn.Module):
    """Append `growth` new channels: [b, channels, h, w] -> [b, channels + growth, h, w]."""

    def __init__(self, channels: int, growth: int, bottleneck: bool) -> None:
        super().__init__()
        self.new = (
            nn.Sequential(
                composite(channels, 4 * growth, kernel=1), composite(4 * growth, growth, kernel=3)
            )
            if bottleneck
            else composite(channels, growth, kernel=3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.new(x)), dim=1)


class DenseNet(nn.Module):
    """A DenseNet: [batch, channels, height, width] -> logits [batch, classes].

    It has three dense blocks of equally many layers. The paper has networks of depth 40 and 100
    with growth 12 and `bottleneck=False, compression=1` (1.0 and 7.0 M parameters); and
    DenseNet-BC, the default here, with depth 100 and growth 12 (0.8 M), 250 and 24 (15.3 M), and
    190 and 40 (25.6 M).

    Args:
        depth: number of weighted layers: 3n + 4, or 6n + 4 with bottlenecks.
        growth: k, the number of channels that each layer adds.
        bottleneck: whether to put a 1x1 convolution to 4k channels before each 3x3 convolution.
        compression: theta, the share of the channels that a transition keeps.
        classes: number of classes.
        channels: number of channels of the input image.
        seed: chooses the initial weights.

    Raises:
        ConfigError: when depth does not have that form, or compression is not in (0, 1].
    """

    family: ClassVar = "DenseNet"
    """The name of the network before its depth, in tables."""

    def __init__(
        self,
        depth: int = 100,
        growth: int = 12,
        bottleneck: bool = True,
        compression: float = 0.5,
        classes: int = 10,
        channels: int = 3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        divisor = 6 if bottleneck else 3
        if depth <= 4 or (depth - 4) % divisor:
            kind = "with" if bottleneck else "without"
            depths = ", ".join(str(divisor * n + 4) for n in (6, 16, 31))
            raise ConfigError(
                f"depth={depth}: a DenseNet {kind} bottlenecks has {divisor}n + 4 layers: {depths}"
            )
        if not 0 < compression <= 1:
            raise ConfigError(f"compression={compression}: it must be above 0 and at most 1")
        layers = (depth - 4) // divisor
        width = 2 * growth if bottleneck and compression < 1 else 16
        features: list[nn.Module] = []
        with torch.device("meta"):
            features.append(nn.Conv2d(channels, width, 3, padding=1, bias=False))
            for block in range(3):
                if block > 0:
                    kept = int(width * compression)
                    features += composite(width, kept, kernel=1), nn.AvgPool2d(2)
                    width = kept
                for _ in range(layers):
                    features.append(DenseLayer(width, growth, bottleneck))
                    width += growth
            features += nn.BatchNorm2d(width), nn.ReLU(inplace=True)
            self.features = nn.Sequential(*features)
            self.head = nn.Linear(width, classes)
        initialise(self, "he", seed)

    @staticmethod
    def takes(height: int, width: int) -> bool:
        """Whether the network accepts images with that many pixels."""
        return min(height, width) >= 4

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))
