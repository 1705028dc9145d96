"""What a training step costs, block by block, and what dropping blocks is expected to save."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stochastic_depth.residual import Residual


@dataclass(frozen=True)
class TrainingCost:
    """FLOPs of one forward and backward pass at constant depth, 2 for each multiply-add."""

    total: int
    branches: tuple[int, ...]
    """Of the residual branches, in the order of the blocks."""

    def expected_saving(self, survival: tuple[float, ...]) -> float:
        """The share of the FLOPs, from 0 to 1, that is not spent under (p_1, ..., p_L).

        A block costs its branch with probability p_l, and nothing else depends on the gates.
        """
        saved = sum((1 - p) * cost for p, cost in zip(survival, self.branches, strict=True))
        return saved / self.total


def training_cost(model: nn.Module, x: Tensor) -> TrainingCost:
    """Count by running one training step of `model`, which must not have gates, on `x`.

    Parameters, gradients and statistics of `model` are changed: give it a network to throw away.

    Args:
        x: [batch, channels, height, width]; the shares do not depend on the batch.
    """
    with FlopCounterMode(display=False) as counter:
        model.train()(x).sum().backward()
    by_module = counter.get_flop_counts()
    root = type(model).__name__
    branches = tuple(
        sum(by_module.get(f"{root}.{name}.branch", {}).values())
        for name, module in model.named_modules()
        if isinstance(module, Residual)
    )
    return TrainingCost(counter.get_total_flops(), branches)
