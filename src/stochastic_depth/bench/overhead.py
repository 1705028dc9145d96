"""The cost of the library itself: all gates open, against the same network written without it."""

import timeit
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stochastic_depth.bench.plain import PlainResNet
from stochastic_depth.models import CifarResNet
from stochastic_depth.randomness import generator
from stochastic_depth.surgery import apply
from stochastic_depth.survival import Uniform
from stochastic_depth.train.build import build_optimizer
from stochastic_depth.train.config import OptimizerConfig
from stochastic_depth.train.execution import Execution

NETWORKS = ("without the library", "applied, all gates open")


def training_steps(
    depth: int, batch: int, size: int, channels: int, execution: Execution
) -> dict[str, Callable[[], object]]:
    """One training step of each of `NETWORKS`, on the same weights and images.

    Args:
        size: height and width of the images.
    """
    applied, plain = CifarResNet(depth, channels=channels), PlainResNet(depth, channels)
    with torch.no_grad():
        for p, q in zip(plain.parameters(), applied.parameters(), strict=True):
            p.copy_(q)
    apply(applied, Uniform(1.0))
    images = torch.randn(batch, channels, size, size, generator=generator("bench"))
    images = images.to(execution.device).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=execution.device) % 10
    return {
        name: _step(model, images, labels, execution)
        for name, model in zip(NETWORKS, (plain, applied), strict=True)
    }


class _Unit(nn.Module):
    """A residual unit as in a model of any author."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def closed_unit_seconds(units: int = 100, passes: int = 10, repeats: int = 100) -> float:
    """Seconds that a closed unit takes of a training forward pass, over a module that returns x.

    Everything is in it: drawing the gates, handing them out, and the call. The best of `repeats`.
    """
    x = torch.ones(1, 1)
    closed = nn.Sequential(*(_Unit() for _ in range(units)))
    apply(closed, Uniform(1e-12), example=x)
    nothing = nn.Sequential(*(nn.Identity() for _ in range(units)))
    best = [
        min(timeit.repeat(lambda m=model: m(x), number=passes, repeat=repeats))
        for model in (closed, nothing)
    ]
    return (best[0] - best[1]) / (units * passes)


def _step(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, execution: Execution
) -> Callable[[], object]:
    model.to(device=execution.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = build_optimizer(OptimizerConfig(), model)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with execution.autocast():
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        execution.synchronise()
        return loss.detach()

    return step
