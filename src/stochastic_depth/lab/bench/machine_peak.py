"""The share of the machine's peak that training steps reach, both measured in the same run."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from stochastic_depth.block_program import library
from stochastic_depth.lab.bench.workload import Step
from stochastic_depth.timing import Timing
from stochastic_depth.train.runtime import Runtime

AT_PEAK = "at the machine's peak"
"""Names the row of a step at constant depth that does nothing but its multiply-adds."""


@dataclass(frozen=True)
class MachinePeak:
    """The peak of this machine, and the FLOPs of a step at constant depth."""

    flops_per_second: float
    """FLOPs per second of a loop of independent multiply-adds, on as many threads."""
    flops_per_step: int
    """2 for each multiply-add, forward and backward."""

    @property
    def timing(self) -> Timing:
        """A step that does nothing but its multiply-adds, as fast as they go."""
        seconds = self.flops_per_step / self.flops_per_second
        return Timing((seconds, seconds))

    def share(self, seconds: float, active: float = 1.0) -> float:
        """The share of the peak that a step reaches.

        Args:
            seconds: what the step takes.
            active: the share of the FLOPs of constant depth that it spends.
        """
        return active * self.flops_per_step / (seconds * self.flops_per_second)

    def to_json(self, seconds: Mapping[str, float]) -> dict[str, Any]:
        """Both figures, and the share of the peak of steps at constant depth."""
        of_the_peak = {name: self.share(value) for name, value in seconds.items()}
        return {**asdict(self), "of_the_peak": of_the_peak}


def machine_peak(runtime: Runtime, constant: Step) -> MachinePeak | None:
    """Measure the peak; None on a GPU, and where no compiler builds the loop.

    Args:
        constant: a step at constant depth, by autograd, whose FLOPs are counted.
    """
    if torch.device(runtime.device).type != "cpu" or library.missing() is not None:
        return None
    dtype = torch.bfloat16 if runtime.precision == "bfloat16" else torch.float32
    return MachinePeak(library.peak(dtype, runtime.threads), step_flops(constant))


def step_flops(step: Callable[[], object]) -> int:
    """FLOPs of the convolutions and products of a step, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()
