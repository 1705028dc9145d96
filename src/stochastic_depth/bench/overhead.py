"""The cost of the library itself: all gates open, against the same network written without it."""

import timeit

import torch
from torch import Tensor, nn

from stochastic_depth.bench.plain import PlainResNet, copy_weights
from stochastic_depth.bench.workload import Step, Workload
from stochastic_depth.models import CifarResNet
from stochastic_depth.surgery import apply
from stochastic_depth.survival import Uniform

NETWORKS = ("without the library", "applied, all gates open")


def training_steps(depth: int, workload: Workload) -> dict[str, Step]:
    """One training step of each of `NETWORKS`, on the same weights and images."""
    channels = workload.channels
    applied, plain = CifarResNet(depth, channels=channels), PlainResNet(depth, channels)
    copy_weights(applied, plain)
    apply(applied, Uniform(1.0))
    steps = map(workload.step, (plain, applied))
    return dict(zip(NETWORKS, steps, strict=True))


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
