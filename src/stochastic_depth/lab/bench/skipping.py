"""What skipping saves, and what the library costs."""

import statistics
import timeit
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stochastic_depth.handle import Handle
from stochastic_depth.lab.bench.engines import active_share
from stochastic_depth.lab.bench.workload import (
    PlainResNet,
    Step,
    Workload,
    copy_weights,
    saved_for_backward,
)
from stochastic_depth.models import CifarResNet
from stochastic_depth.surgery import apply, summary
from stochastic_depth.survival import LinearDecay, Survival, Uniform
from stochastic_depth.timing import take_turns

CONSTANT = "constant depth"


def alternatives(blocks: int) -> dict[str, Survival]:
    """The survival probabilities that are timed: linear decay, and fixed shares of the blocks."""
    fixed = {
        f"{100 * share:.0f} % of blocks": active_share(blocks, share) for share in (0.75, 0.5, 0.25)
    }
    return {
        CONSTANT: Uniform(1.0),
        "p_L = 0.5": LinearDecay(0.5),
        "p_L = 0.2": LinearDecay(0.2),
        **fixed,
    }


@dataclass(frozen=True)
class Skipping:
    """Training steps of one alternative, round by round."""

    seconds: tuple[float, ...]
    relative: tuple[float, ...]
    """To constant depth in the same round."""
    active: tuple[float, ...]
    """The share of the FLOPs of constant depth that was spent."""

    @property
    def efficiencies(self) -> list[float]:
        """Time saved over FLOPs saved, round by round; none where no FLOPs are saved."""
        return [
            (1 - time) / (1 - flops)
            for time, flops in zip(self.relative, self.active, strict=True)
            if flops < 1
        ]


Round = dict[str, tuple[float, float]]


def skippings(rounds: Sequence[Round]) -> dict[str, Skipping]:
    """What came of `rounds`, by alternative."""
    return {
        name: Skipping(
            tuple(r[name][0] for r in rounds),
            tuple(r[name][0] / r[CONSTANT][0] for r in rounds),
            tuple(r[name][1] for r in rounds),
        )
        for name in rounds[0]
    }


class Skip:
    """The alternatives, each a network of its own."""

    def __init__(self, depth: int, workload: Workload) -> None:
        self._depths: dict[str, Handle] = {}
        self._costs: list[float] = []
        self.steps: dict[str, Step] = {}
        for name, survival in alternatives((depth - 2) // 2).items():
            model = CifarResNet(depth, channels=workload.channels)
            step = self.steps[name] = workload.engine_step(model, survival)
            assert step.handle is not None
            self._depths[name] = step.handle
            self._costs = self._costs or _costs(model, workload)

    def rounds(self, repeats: int) -> Iterator[Round]:
        """Take turns: seconds, and the share of FLOPs that was active, by alternative."""
        for seconds in take_turns(self.steps, repeats):
            yield {name: (seconds[name], self.active_flops(name)) for name in self.steps}

    def active_flops(self, name: str) -> float:
        """The share of the FLOPs of constant depth that the last step has spent."""
        gates = self._depths[name].gates.tolist()
        return 1 - sum(c for c, is_open in zip(self._costs, gates, strict=True) if not is_open)

    def memory(self, name: str, steps: int) -> tuple[float, float]:
        """What is kept for backward, and the share of active blocks, relative to constant depth.

        Means of `steps` steps.
        """
        full = saved_for_backward(self.steps[CONSTANT])
        saved, active = [], []
        for _ in range(steps):
            saved.append(saved_for_backward(self.steps[name]) / full)
            active.append(self._depths[name].gates.double().mean().item())
        return statistics.mean(saved), statistics.mean(active)


def _costs(model: nn.Module, workload: Workload) -> list[float]:
    """The share of the FLOPs of a training step that is in each block."""
    costs = summary(model, torch.randn(1, workload.channels, workload.size, workload.size))
    full = costs.forward + costs.backward
    return [(block.forward + block.backward) / full for block in costs.blocks]


NETWORKS = ("without the library", "applied, all gates open")


def overhead_steps(depth: int, workload: Workload) -> dict[str, Step]:
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
