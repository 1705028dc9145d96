"""What the steps of one interval have measured, gathered on the device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stochastic_depth.gates import open_shares
from stochastic_depth.train.step import Measured

_ROWS = ("measured", "block_gradients")
"""What lies on the device."""


@dataclass
class Tally:
    """Sums over the interval under way; part of every checkpoint."""

    measured: list[Tensor] = field(default_factory=list)
    """One `Measured` a step, as a tensor [3] on the device."""
    images: list[int] = field(default_factory=list)
    block_gradients: list[Tensor] = field(default_factory=list)
    """Of each sampled step, the mean absolute gradient at the first convolution of each block, nan
    where it was closed: [L] on the device."""
    seconds: float = 0.0

    def add(self, measured: Measured, images: int) -> None:
        """Count one step."""
        self.measured.append(torch.stack(measured))
        self.images.append(images)

    def add_block_gradients(self, gradients: Sequence[Tensor | None], gates: Tensor) -> None:
        """Sample one step.

        Args:
            gradients: of the weight of each block's first convolution; where the block was closed
                they are not looked at.
            gates: bool [L], or [L, batch].
        """
        opened = open_shares(gates) > 0
        pairs = zip(gradients, opened.tolist(), strict=True)
        of_open = [gradient for gradient, b in pairs if b and gradient is not None]
        means = self.measured[-1].new_full(opened.shape, math.nan)
        if of_open:
            sums = torch.stack(torch._foreach_norm(of_open, 1))  # pyright: ignore[reportPrivateImportUsage]
            sizes = torch.tensor([gradient.numel() for gradient in of_open])
            means[opened] = (sums / sizes.to(sums.device)).to(means.dtype)
        self.block_gradients.append(means)

    def first_diverged(self, last: int) -> int | None:
        """The position of the first loss that is not finite among the `last` ones, if any."""
        start = max(0, len(self.measured) - last)
        losses = torch.stack(self.measured[start:])[:, 0]
        diverged = (~losses.isfinite()).nonzero().flatten().tolist()
        return start + diverged[0] if diverged else None

    def means(self) -> Measured:
        """The loss, over images; what was measured of gradients, over steps. float64."""
        values = torch.stack(self.measured).double().cpu()
        images = torch.tensor(self.images, dtype=torch.float64)
        loss = (values[:, 0] * images).sum() / images.sum()
        return Measured(loss, *values[:, 1:].mean(0))

    def block_means(self, blocks: int) -> list[float | None]:
        """Of each of `blocks` over the sampled steps in which it was open; None without any."""
        if not self.block_gradients:
            return [None] * blocks
        means = torch.stack(self.block_gradients).double().nanmean(0)
        return [None if math.isnan(mean) else mean for mean in means.tolist()]

    def state_dict(self) -> dict[str, Any]:
        return {
            **vars(self),
            **{name: [row.cpu() for row in getattr(self, name)] for name in _ROWS},
        }

    def load_state_dict(self, state: dict[str, Any], device: str) -> None:
        # States did not always have all of these, and had others.
        vars(self).update({name: state[name] for name in vars(self) if name in state})
        for name in _ROWS:
            setattr(self, name, [row.to(device) for row in getattr(self, name)])
