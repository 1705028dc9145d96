"""A small vision transformer for images of CIFAR's size, built from `Residual` units.

It has pre-norm units, fixed two-dimensional sine and cosine positions, and the mean over patches
instead of a class token (Beyer, Zhai and Kolesnikov 2022, arXiv:2205.01580).
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stochastic_depth.choices import Initialisation
from stochastic_depth.errors import ConfigError
from stochastic_depth.models.initialisation import initialise
from stochastic_depth.residual import Residual

WIDTH, HEADS, PATCH = 64, 4, 2


class Attention(nn.Module):
    """Self-attention: [batch, tokens, width] -> [batch, tokens, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def units() -> list[Residual]:
    """The attention unit and the MLP unit of one transformer block."""
    return [
        Residual(nn.Sequential(nn.LayerNorm(WIDTH), Attention())),
        Residual(
            nn.Sequential(
                nn.LayerNorm(WIDTH),
                nn.Linear(WIDTH, 4 * WIDTH),
                nn.GELU(),
                nn.Linear(4 * WIDTH, WIDTH),
            )
        ),
    ]


def positions(height: int, width: int) -> Tensor:
    """Sines and cosines of the row and column of each patch: [height * width, WIDTH]."""
    frequencies = 10_000.0 ** -torch.linspace(0, 1, WIDTH // 4)
    rows = torch.arange(height).repeat_interleave(width)[:, None] * frequencies
    columns = torch.arange(width).repeat(height)[:, None] * frequencies
    return torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()], 1)


class VisionTransformer(nn.Module):
    """A vision transformer: [batch, channels, height, width] -> logits [batch, classes].

    Patches have 2x2 pixels, the width is 64, and there are 4 heads.

    Args:
        depth: number of transformer blocks, each of two residual units.
        classes: number of classes.
        channels: number of channels of the input image.
        init: with "zero-gain" each unit starts as its shortcut, see `initialise`.
        seed: chooses the initial weights.

    Raises:
        ConfigError: when depth is below 1.
    """

    family: ClassVar = "ViT"
    """The name of the network before its depth, in tables."""

    def __init__(
        self,
        depth: int = 6,
        classes: int = 10,
        channels: int = 3,
        init: Initialisation = "zero-gain",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ConfigError(f"depth={depth}: a vision transformer has at least one block")
        with torch.device("meta"):
            self.stem = nn.Conv2d(channels, WIDTH, PATCH, PATCH)
            self.blocks = nn.Sequential(*(unit for _ in range(depth) for unit in units()))
            self.norm = nn.LayerNorm(WIDTH)
            self.head = nn.Linear(WIDTH, classes)
        initialise(self, init, seed)

    @staticmethod
    def takes(height: int, width: int) -> bool:
        """Whether the network accepts images with that many pixels."""
        return min(height, width) >= PATCH

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x.flatten(2).transpose(1, 2) + positions(*x.shape[2:]).to(x)
        return self.head(self.norm(self.blocks(x)).mean(1))
