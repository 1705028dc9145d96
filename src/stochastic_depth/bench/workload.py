"""What is timed: training steps of CIFAR ResNets on random images."""

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
        model.to(device=execution.device, memory_format=layout)  # pyright: ignore[reportCallIssue]
        shape = self.batch, self.channels, self.size, self.size
        images = torch.randn(shape, generator=generator("bench")).to(execution.device)
        images = images.contiguous(memory_format=layout)
        labels = torch.arange(self.batch, device=execution.device) % 10
        optimizer = build_optimizer(OptimizerConfig(), model)

        def step() -> Tensor:
            optimizer.zero_grad()
            with execution.autocast():
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            execution.synchronise()
            return loss.detach()

        return step
