"""What training steps cost: time, FLOPs and memory."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from stochastic_depth.lab.bench.results import (
    MEMORY,
    bench_table,
    time_in_turns,
    with_progress,
)
from stochastic_depth.lab.bench.workload import Step, step_memory
from stochastic_depth.surgery.flops import CountFlops
from stochastic_depth.train.runtime import Runtime


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
    """Bytes, as `MEMORY` says."""
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
        counted: how many steps are counted; as many as are timed when not given. They are the first
            steps of networks that are built again, so FLOPs and memory are of the same gates.
    """
    steps = build()
    for step in steps.values():  # allocate and choose algorithms once
        step()
    timed = time_in_turns(steps, repeats, console, runtime, warmup=0)
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

    flops, kept = each(step_flops), each(partial(step_memory, device=runtime.device, steps=1))
    return {
        name: StepCost(
            statistics.fmean(timed.timings[name].values),
            statistics.fmean(flops[name]),
            statistics.fmean(kept[name]),
            max(kept[name]),
        )
        for name in flops
    }


COSTS = f"all as shares of {{}}'s, means of the steps; memory {MEMORY}"
"""The sentence below a table of `costs_table`, with the name of the alternative."""


def costs_table(
    title: str, costs: Mapping[str, StepCost], relative_to: str, runtime: Runtime
) -> Table:
    """A row for each alternative, relative to one of them."""
    table = bench_table(title, runtime, "", "step", "time", "FLOPs", "memory", "its peak")
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
