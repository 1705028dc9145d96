"""One training step, one evaluation, and the measurements of the steps of an interval."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stochastic_depth.data import Batches
from stochastic_depth.data.batching import Part
from stochastic_depth.distributed.world import all_reduce_sum, world_size
from stochastic_depth.draw import open_shares
from stochastic_depth.surgery.model_state import in_evaluation
from stochastic_depth.torch_private import norms
from stochastic_depth.train.runtime import Runtime


class StepMetrics(NamedTuple):
    """Results of one training step: scalars on the device, so that the host need not wait."""

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
    first_weight: nn.Parameter,
    runtime: Runtime,
    weight: float = 1,
) -> StepMetrics:
    """Forward pass, backward pass, update. `model` itself draws the gates.

    Args:
        images: [batch, channels, height, width], normalised.
        labels: int64 [batch].
        first_weight: the weight of the first convolution, which no gate can skip.
        weight: the weight of this process's loss, if processes have different numbers of images.
            Its mean over the processes is 1.
    """
    optimizer.zero_grad()
    with runtime.autocast():
        loss = F.cross_entropy(model(images), labels)
    if weight != 1:
        loss = loss * weight
    loss.backward()
    optimizer.step()
    assert first_weight.grad is not None
    return step_metrics(all_reduce_sum(loss.detach() / world_size()), first_weight.grad)


def step_metrics(loss: Tensor, gradient: Tensor) -> StepMetrics:
    """The results of a step, from its loss and the gradient at the first convolution."""
    gradient = gradient.flatten()
    return StepMetrics(loss, gradient.norm(), gradient.abs().mean())


class Evaluation(NamedTuple):
    """Mean cross-entropy and error in percent over one part of the data."""

    loss: float
    error: float


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], runtime: Runtime
) -> Evaluation:
    """Evaluate the network at full depth, in evaluation mode. Counts are exact.

    If several processes train, each passes its shard as `batches`, and all get the results over all
    shards. Without any batch, loss and error are nan.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=runtime.device)
    with in_evaluation(model):
        for images, labels in batches:
            with runtime.autocast():
                logits = model(images)
            loss = F.cross_entropy(logits.double(), labels, reduction="sum")
            wrong = (logits.argmax(1) != labels).sum()
            sums[0] += loss
            sums[1] += wrong
            sums[2] += len(labels)
    loss, wrong, seen = all_reduce_sum(sums).tolist()
    return Evaluation(loss / seen, 100 * wrong / seen) if seen else Evaluation(math.nan, math.nan)


def evaluate_parts(
    model: nn.Module,
    batches: Batches,
    runtime: Runtime,
    until: Callable[[], object] = lambda: False,
) -> dict[Part, Evaluation]:
    """Evaluate on the validation and on the test images; only once, if they are the same.

    Args:
        until: called before each batch; when it returns true, the remaining batches are left out.
    """

    def on(part: Part) -> Evaluation:
        images = takewhile(lambda _: not until(), batches.evaluate(part))
        return evaluate(model, images, runtime)

    validation = on("validation")
    return {"validation": validation, "test": on("test") if batches.held_out else validation}


@dataclass
class IntervalMetrics:
    """The measurements of all steps since the last evaluation; part of every checkpoint."""

    measured: list[Tensor] = field(default_factory=list)
    """One `StepMetrics` a step, as a tensor [3] on the device."""
    images: list[int] = field(default_factory=list)
    block_gradients: list[Tensor] = field(default_factory=list)
    """For each sampled step, the mean absolute gradient at the first convolution of each block, nan
    where the block was closed: [L] on the device."""
    seconds: float = 0.0

    def add(self, measured: StepMetrics, images: int) -> None:
        """Add the measurements of one step."""
        self.measured.append(torch.stack(measured))
        self.images.append(images)

    def add_block_gradients(self, gradients: Sequence[Tensor | None], gates: Tensor) -> None:
        """Add the block gradients of one sampled step.

        Args:
            gradients: the gradient of the weight of each block's first convolution; ignored where
                the block was closed.
            gates: bool [L], or [L, batch].
        """
        opened = open_shares(gates) > 0
        pairs = zip(gradients, opened.tolist(), strict=True)
        open_gradients = [gradient for gradient, b in pairs if b and gradient is not None]
        means = self.measured[-1].new_full(opened.shape, math.nan)
        if open_gradients:
            sums = torch.stack(norms(open_gradients, 1))
            sizes = torch.tensor([gradient.numel() for gradient in open_gradients])
            means[opened] = (sums / sizes.to(sums.device)).to(means.dtype)
        self.block_gradients.append(means)

    def first_diverged(self, last: int) -> int | None:
        """The position of the first loss that is not finite among the `last` ones, if any."""
        start = max(0, len(self.measured) - last)
        losses = torch.stack(self.measured[start:])[:, 0]
        diverged = (~losses.isfinite()).nonzero().flatten().tolist()
        return start + diverged[0] if diverged else None

    def means(self) -> StepMetrics:
        """The mean of the loss over images, and of the gradients over steps: float64."""
        values = torch.stack(self.measured).double().cpu()
        images = torch.tensor(self.images, dtype=torch.float64)
        loss = (values[:, 0] * images).sum() / images.sum()
        return StepMetrics(loss, *values[:, 1:].mean(0))

    def block_means(self, blocks: int) -> list[float | None]:
        """Mean gradient of each block over the sampled steps in which it was open, or None."""
        if not self.block_gradients:
            return [None] * blocks
        means = torch.stack(self.block_gradients).double().nanmean(0)
        return [None if math.isnan(mean) else mean for mean in means.tolist()]

    def state_dict(self) -> dict[str, Any]:
        """The fields, with their tensors on the CPU."""
        return {
            **vars(self),
            "measured": [row.cpu() for row in self.measured],
            "block_gradients": [row.cpu() for row in self.block_gradients],
        }

    def load_state_dict(self, state: dict[str, Any], device: str) -> None:
        """Restore what `state_dict` has returned, with its tensors on `device`."""
        self.measured = [row.to(device) for row in state["measured"]]
        self.images, self.seconds = state["images"], state["seconds"]
        self.block_gradients = [row.to(device) for row in state["block_gradients"]]
