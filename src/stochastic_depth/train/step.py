"""One training step, and one evaluation."""

import math
from collections.abc import Callable, Iterable
from itertools import takewhile
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stochastic_depth.data import Batches
from stochastic_depth.data.protocol import Part
from stochastic_depth.distributed.world import ranks, total
from stochastic_depth.train.execution import Execution


class Measured(NamedTuple):
    """What one training step tells: scalars on the device, so that nothing waits for them."""

    loss: Tensor
    gradient_norm: Tensor
    """L2 norm of the gradient at the first convolution."""
    gradient_mean: Tensor
    """Mean absolute gradient at the first convolution (the paper, section 5)."""


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    first: nn.Parameter,
    execution: Execution,
    weight: float = 1,
) -> Measured:
    """Forward, backward, update. Gates are drawn by `model` itself.

    Args:
        images: [batch, channels, height, width], normalised.
        labels: int64 [batch].
        first: the weight of the first convolution, which no gate can skip.
        weight: of these images, where other processes have more or fewer: the mean over processes
            of what they weigh is 1.
    """
    optimizer.zero_grad()
    with execution.autocast():
        loss = F.cross_entropy(model(images), labels)
    if weight != 1:
        loss = loss * weight
    loss.backward()
    optimizer.step()
    assert first.grad is not None
    return measured(total(loss.detach() / ranks()), first.grad)


def measured(loss: Tensor, gradient: Tensor) -> Measured:
    """What a step tells, given the gradient at the first convolution."""
    gradient = gradient.flatten()
    return Measured(loss, gradient.norm(), gradient.abs().mean())


class Evaluation(NamedTuple):
    """Mean cross-entropy and error in percent over one part of the data."""

    loss: float
    error: float


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], execution: Execution
) -> Evaluation:
    """The full network in evaluation mode, every branch scaled by p_l. Counts are exact.

    Where several processes train, `batches` are the shares of each, and the figures of all.

    Without any batch there is nothing to tell, and both figures are nan.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=execution.device)
    for images, labels in batches:
        with execution.autocast():
            logits = model(images)
        loss = F.cross_entropy(logits.double(), labels, reduction="sum")
        wrong = (logits.argmax(1) != labels).sum()
        sums[0] += loss
        sums[1] += wrong
        sums[2] += len(labels)
    model.train(was_training)
    loss, wrong, seen = total(sums).tolist()
    return Evaluation(loss / seen, 100 * wrong / seen) if seen else Evaluation(math.nan, math.nan)


def evaluate_parts(
    model: nn.Module,
    batches: Batches,
    execution: Execution,
    until: Callable[[], object] = lambda: False,
) -> dict[Part, Evaluation]:
    """`evaluate` on the images for validation and for testing: once, where they are the same.

    Args:
        until: asked before each batch; when it says so, the rest is left out.
    """

    def on(part: Part) -> Evaluation:
        images = takewhile(lambda _: not until(), batches.evaluate(part))
        return evaluate(model, images, execution)

    validation = on("validation")
    return {"validation": validation, "test": on("test") if batches.held_out else validation}
