"""What is timed: training steps on random inputs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stochastic_depth.randomness import generator
from stochastic_depth.train.build import build_optimizer
from stochastic_depth.train.config import OptimizerConfig
from stochastic_depth.train.execution import Execution

Step = Callable[[], Tensor]
"""One training step; gives its loss."""


@dataclass(frozen=True)
class Workload:
    """Images and labels of one mini-batch, and how to compute."""

    batch: int
    size: int
    """Height and width of the images."""
    channels: int
    execution: Execution

    def step(self, model: nn.Module, tutorial: bool = False) -> Step:
        """A training step of `model`: forward, backward, SGD.

        Args:
            tutorial: in float32 and PyTorch's default memory format, whatever `execution` says.
        """
        execution = self.execution
        if tutorial:
            execution = Execution(execution.device, "float32", execution.threads)
        layout = torch.contiguous_format if tutorial else torch.channels_last
        labels = torch.arange(self.batch) % 10
        return training_step(model, self.images(), labels, execution, layout)

    def images(self) -> Tensor:
        """Random ones: float32 [batch, channels, size, size], always the same."""
        shape = self.batch, self.channels, self.size, self.size
        return torch.randn(shape, generator=generator("bench"))


def training_step(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    execution: Execution,
    layout: torch.memory_format = torch.channels_last,
) -> Step:
    """Forward, backward, SGD with the cross-entropy of logits [..., classes] and labels [...].

    Args:
        layout: the memory format of the weights, and of inputs that are images.
    """
    model.to(device=execution.device, memory_format=layout)  # pyright: ignore[reportCallIssue]
    inputs, labels = inputs.to(execution.device), labels.to(execution.device).flatten()
    if inputs.ndim == 4:
        inputs = inputs.contiguous(memory_format=layout)
    optimizer = build_optimizer(OptimizerConfig(), model)

    def step() -> Tensor:
        optimizer.zero_grad()
        with execution.autocast():
            loss = F.cross_entropy(model(inputs).flatten(0, -2), labels)
        loss.backward()
        optimizer.step()
        execution.synchronise()
        return loss.detach()

    return step
