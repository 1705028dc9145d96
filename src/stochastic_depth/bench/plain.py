"""ResNet 6n + 2 as anybody would write it, without this library: what its cost is measured from."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainBlock(nn.Module):
    """A residual unit; `drop` is what a library puts after the branch."""

    def __init__(self, channels_in: int, channels: int, drop: nn.Module) -> None:
        super().__init__()
        self.drop = drop
        stride = 1 + (channels != channels_in)
        self.added = channels - channels_in
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 0, self.added)) if self.added else x
        x = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(shortcut + self.drop(self.norm2(self.conv2(x))))


class PlainResNet(nn.Module):
    """[batch, channels, height, width] -> logits [batch, 10]: the arithmetic of `CifarResNet`.

    Args:
        drops: what comes after each branch; nothing if not given.
    """

    def __init__(
        self, depth: int, channels: int = 3, drops: Sequence[nn.Module] | None = None
    ) -> None:
        super().__init__()
        n = (depth - 2) // 6
        drops = drops or [nn.Identity() for _ in range(3 * n)]
        self.conv = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        widths = [16] * n + [32] * n + [64] * n
        self.blocks = nn.Sequential(*map(PlainBlock, [16, *widths[:-1]], widths, drops))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)), inplace=True)
        return self.head(self.blocks(x).mean((2, 3)))


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the parameters of `source`, in order."""
    with torch.no_grad():
        for p, q in zip(target.parameters(), source.parameters(), strict=True):
            p.copy_(q)
