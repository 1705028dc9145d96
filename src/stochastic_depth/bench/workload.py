"""What is timed: training steps on random inputs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stochastic_depth.handle import Handle
from stochastic_depth.models import CifarResNet
from stochastic_depth.randomness import generator
from stochastic_depth.surgery import apply
from stochastic_depth.survival import Survival
from stochastic_depth.train.build import build_optimizer, first_convolution
from stochastic_depth.train.config import OptimizerConfig
from stochastic_depth.train.engines import build_engine
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

    def engine_step(self, model: CifarResNet, survival: Survival | None = None) -> "EngineStep":
        """A training step of `model` as `train` takes it: by the engine of `execution`.

        Args:
            survival: of its blocks; constant depth if not given.
        """
        depth = None if survival is None else apply(model, survival)
        labels = torch.arange(self.batch) % 10
        return EngineStep(model, depth, self.images(), labels, self.execution)

    def images(self) -> Tensor:
        """Random ones: float32 [batch, channels, size, size], always the same."""
        shape = self.batch, self.channels, self.size, self.size
        return torch.randn(shape, generator=generator("bench"))


class EngineStep:
    """The training step that `train` takes."""

    def __init__(
        self,
        model: CifarResNet,
        handle: Handle | None,
        images: Tensor,
        labels: Tensor,
        execution: Execution,
    ) -> None:
        self.model, self.handle = model, handle
        model.to(device=execution.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        images = images.contiguous(memory_format=torch.channels_last).to(execution.device)
        self._batch = images, labels.to(execution.device)
        self._execution = execution
        self.engine = build_engine(
            model,
            handle,
            build_optimizer(OptimizerConfig(), model),
            first_convolution(model),
            execution,
            tuple(images.shape),
        )

    def __call__(self) -> Tensor:
        loss = self.engine.step(*self._batch).loss
        self._execution.synchronise()
        return loss


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
