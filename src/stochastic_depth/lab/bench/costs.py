"""What training steps cost: time, FLOPs, and bytes kept for the backward pass.

`MachinePeak` is the most FLOPs per second that this machine reaches, against which steps are held.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from stochastic_depth.block_program import library
from stochastic_depth.lab.bench.results import bench_table, clock, time_in_turns, with_progress
from stochastic_depth.lab.bench.workload import Step, saved_for_backward
from stochastic_depth.surgery.flops import CountFlops
from stochastic_depth.timing import Timing
from stochastic_depth.train.runtime import Runtime

AT_PEAK = "at the machine's peak"
"""The name of the row for a step of constant depth that does nothing but its multiply-adds."""


@dataclass(frozen=True)
class MachinePeak:
    """The peak of this machine, and the FLOPs of a step at constant depth."""

    flops_per_second: float
    """FLOPs per second of a loop of independent multiply-adds, on as many threads as the steps."""
    flops_per_step: int
    """Forward and backward, counted as 2 per multiply-add."""

    @property
    def timing(self) -> Timing:
        """The time of a step that does nothing but its multiply-adds, at peak speed."""
        seconds = self.flops_per_step / self.flops_per_second
        return Timing((seconds, seconds))

    def share(self, seconds: float, active: float = 1.0) -> float:
        """The share of the peak that a step reaches.

        Args:
            seconds: how long the step takes.
            active: the share of the FLOPs of constant depth that it spends.
        """
        return active * self.flops_per_step / (seconds * self.flops_per_second)

    def to_json(self, seconds: Mapping[str, float]) -> dict[str, Any]:
        """Both values, and the share of the peak that steps at constant depth reach."""
        of_the_peak = {name: self.share(value) for name, value in seconds.items()}
        return {**asdict(self), "of_the_peak": of_the_peak}


def machine_peak(runtime: Runtime, constant: Step) -> MachinePeak | None:
    """Measure the peak; None on a GPU, and where no compiler can build the loop.

    Args:
        constant: a step at constant depth, by autograd, whose FLOPs are counted.
    """
    if runtime.on_gpu or library.why_unavailable() is not None:
        return None
    dtype = torch.bfloat16 if runtime.precision == "bfloat16" else torch.float32
    return MachinePeak(library.peak(dtype, runtime.threads), step_flops(constant))


def step_flops(step: Callable[[], object]) -> int:
    """FLOPs of the convolutions, products and attention of a step, forward and backward."""
    with CountFlops() as counted:
        step()
    return counted.total


Build = Callable[[], Mapping[str, Step]]
"""Returns the training steps of all alternatives, by name."""


@dataclass(frozen=True)
class StepCost:
    """Means over the steps of one alternative; the peak is a maximum."""

    seconds: float
    """Mean seconds of a step, by `clock`."""
    flops: float
    kept: float
    """Bytes that are kept for the backward pass, without parameters."""
    peak_kept: float
    """The bytes of the step that keeps the most."""

    def relative_to(self, other: "StepCost") -> "StepCost":
        """Each value as a share of the same value of `other`."""
        shares = zip(vars(self).values(), vars(other).values(), strict=True)
        return StepCost(*(mine / theirs for mine, theirs in shares))


def step_costs(
    build: Build, repeats: int, runtime: Runtime, console: Console, counted: int | None = None
) -> dict[str, StepCost]:
    """Time `repeats` steps of every alternative in turns, then count the costs of more steps.

    Args:
        counted: how many steps are counted; as many as are timed when not given. Gates, and
            everything that depends on them, are those of the first steps.
    """
    steps = build()
    for step in steps.values():  # allocate and choose algorithms once
        step()
    timed = time_in_turns(steps, repeats, console, clock(runtime), warmup=0)
    del steps
    counted = counted or repeats

    def each(measure: Callable[[Step], float]) -> dict[str, list[float]]:
        """Measure each alternative on the same steps, but one after the other."""
        return {
            name: [
                measure(step) for _ in with_progress(range(counted), counted, console, "counting")
            ]
            for name, step in build().items()
        }

    flops, kept = each(step_flops), each(saved_for_backward)
    return {
        name: StepCost(
            statistics.fmean(timed.timings[name].seconds),
            statistics.fmean(flops[name]),
            statistics.fmean(kept[name]),
            max(kept[name]),
        )
        for name in flops
    }


COSTS = "time, FLOPs, bytes kept for backward: means, as shares of {}'s"
"""The sentence below a table of `costs_table`, with the name of the alternative."""


def costs_table(
    title: str, costs: Mapping[str, StepCost], relative_to: str, runtime: Runtime
) -> Table:
    """A row for each alternative, relative to one of them."""
    table = bench_table(title, runtime, "", "step", "time", "FLOPs", "bytes kept", "peak bytes")
    for name, cost in costs.items():
        shares = (f"{share:.3f}" for share in vars(cost.relative_to(costs[relative_to])).values())
        table.add_row(name, f"{1e3 * cost.seconds:,.1f} ms", *shares)
    return table


def costs_to_json(costs: Mapping[str, StepCost], relative_to: str) -> dict[str, Any]:
    """The costs of each alternative, and the same relative to one of them."""
    return {
        name: {**asdict(cost), "relative": asdict(cost.relative_to(costs[relative_to]))}
        for name, cost in costs.items()
    }
