"""ResNet 6n + 2 as anybody would write it, without this library: what its cost is measured from."""

import torch.nn.functional as F
from torch import Tensor, nn


class PlainBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        stride = 1 + (channels != channels_in)
        self.added = channels - channels_in
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 0, self.added)) if self.added else x
        x = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(shortcut + self.norm2(self.conv2(x)))


class PlainResNet(nn.Module):
    """[batch, channels, height, width] -> logits [batch, 10]: the arithmetic of `CifarResNet`."""

    def __init__(self, depth: int, channels: int = 3) -> None:
        super().__init__()
        n = (depth - 2) // 6
        self.conv = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        widths = [16] * n + [32] * n + [64] * n
        self.blocks = nn.Sequential(
            *(PlainBlock(a, b) for a, b in zip([16, *widths[:-1]], widths, strict=True))
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)), inplace=True)
        return self.head(self.blocks(x).mean((2, 3)))
