"""What the steps of one interval have measured, gathered on the device."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stochastic_depth.train.step import Measured


@dataclass
class Tally:
    """Sums over the interval under way; part of every checkpoint."""

    measured: list[Tensor] = field(default_factory=list)
    """One `Measured` a step, as a tensor [3] on the device."""
    images: list[int] = field(default_factory=list)
    active_blocks: float = 0.0
    expected_active_blocks: float = 0.0
    seconds: float = 0.0

    def add(self, measured: Measured, images: int, active: float, expected: float) -> None:
        self.measured.append(torch.stack(measured))
        self.images.append(images)
        self.active_blocks += active
        self.expected_active_blocks += expected

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

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "measured": [row.cpu() for row in self.measured]}

    def load_state_dict(self, state: dict[str, Any], device: str) -> None:
        vars(self).update(state)
        self.measured = [row.to(device) for row in state["measured"]]
