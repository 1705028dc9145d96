"""What the library costs: all gates open, and blocks that are closed."""

import timeit
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from stochastic_depth.lab.bench.results import Rounds, table_of, time_in_turns
from stochastic_depth.lab.bench.workload import PlainResNet, Step, Workload, copy_weights
from stochastic_depth.lab.options import OverheadOptions
from stochastic_depth.models import CifarResNet
from stochastic_depth.surgery import apply
from stochastic_depth.survival import Uniform
from stochastic_depth.timing import Timing, paired_ratio
from stochastic_depth.train.runtime import Runtime

ALTERNATIVES = ("without the library", "applied, all gates open")


def overhead_steps(depth: int, workload: Workload) -> dict[str, Step]:
    """One training step of each of `ALTERNATIVES`, on the same weights and images."""
    channels = workload.channels
    applied, plain = CifarResNet(depth, channels=channels), PlainResNet(depth, channels)
    copy_weights(applied, plain)
    apply(applied, Uniform(1.0))
    steps = map(workload.step, (plain, applied))
    return dict(zip(ALTERNATIVES, steps, strict=True))


class _Unit(nn.Module):
    """A residual unit as in a model of any author."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def closed_unit_seconds(units: int = 100, passes: int = 1000) -> float:
    """The seconds that a closed unit adds to a training forward pass, over a module that returns x.

    They include drawing the gates, handing them to the blocks, and the call. The fastest of
    `passes` counts.
    """
    x = torch.ones(2, 1)
    model = nn.Sequential(*(_Unit() for _ in range(units)))
    handle = apply(model, Uniform(0.5), example=x)
    nothing = nn.Sequential(*(nn.Identity() for _ in range(units)))
    with handle.forced([True] + [False] * (units - 1)):  # one is open, so that there is a graph
        closed, returned = (
            min(timeit.repeat(lambda m=m: m(x), number=1, repeat=passes)) for m in (model, nothing)
        )
    drawn = min(timeit.repeat(lambda: handle.gates_at(0), number=1, repeat=passes))
    return (closed + drawn - returned) / units


@dataclass(frozen=True)
class OverheadResult:
    """Training steps of both alternatives, and the cost of a closed unit."""

    timed: Rounds
    closed_unit_seconds: float

    @property
    def ratio(self) -> float:
        """The median seconds with the library over those without."""
        without, applied = (self.timed.timings[name] for name in ALTERNATIVES)
        return applied.median / without.median

    @property
    def paired(self) -> Timing:
        """The same ratio, round by round."""
        return paired_ratio(self.timed.rounds, ALTERNATIVES[1], ALTERNATIVES[0])

    def to_json(self) -> dict[str, Any]:
        return {
            **self.timed.to_json(),
            "ratio_of_medians": self.ratio,
            "median_of_ratios": self.paired.median,
            "closed_unit_seconds": self.closed_unit_seconds,
        }


def measure(options: OverheadOptions, runtime: Runtime, console: Console) -> OverheadResult:
    """Time the library with all gates open against the same network written without it."""
    steps = overhead_steps(options.depth, Workload(options.batch, options.size, 3, runtime))
    timed = time_in_turns(steps, options.repeats, console, runtime)
    return OverheadResult(timed, closed_unit_seconds())


def tables(
    result: OverheadResult, options: OverheadOptions, runtime: Runtime
) -> Iterator[Table | str]:
    title = f"A training step of ResNet-{options.depth}, batch {options.batch}"
    yield table_of(title, runtime, result.timed.timings, options.batch)
    paired = result.paired
    low, high = paired.quartiles
    yield (
        f"cost of the library: {100 * (result.ratio - 1):+.2f} % by medians; round by round "
        f"{100 * (paired.median - 1):+.2f} % ({100 * (low - 1):+.2f} to "
        f"{100 * (high - 1):+.2f})"
    )
    yield (
        f"a closed unit of a foreign model: {1e6 * result.closed_unit_seconds:.2f} microseconds a "
        "forward pass"
    )
