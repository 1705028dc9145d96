"""What drop rates save on any model, in time and memory: measured for `inspect --report`."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.draw import draw
from stochastic_depth.lab.bench.workload import saved_for_backward
from stochastic_depth.surgery import Summary, handle_of
from stochastic_depth.surgery.example import caller, sum_of_outputs
from stochastic_depth.surgery.model_state import preserve_state
from stochastic_depth.survival import LinearDecay, survival_probabilities
from stochastic_depth.timing import take_turns

RATES = (0.1, 0.2, 0.5)
"""Drop rates of the last block, under linear decay."""
DRAWS = 4
"""How many sets of gates are timed for each rate, each of which closes a block."""


@dataclass(frozen=True)
class Saving:
    """What training steps at one drop rate save, relative to full depth."""

    rate: float
    flops: float
    """The expected share of FLOPs that is saved."""
    time: float
    memory: float


def measure_rates(
    model: nn.Module, example: Any, costs: Summary, repeats: int
) -> tuple[float, list[Saving]]:
    """The seconds of a training step at full depth, and what each of `RATES` saves.

    Forward and backward passes take turns at full depth and under the gates of the first training
    steps that close a block at each rate. Memory is what a step keeps for its backward pass.
    """
    handle = handle_of(model)
    blocks = len(costs.blocks)
    rules = {rate: survival_probabilities(LinearDecay(1 - rate), blocks) for rate in RATES}
    patterns: dict[str, Tensor] = {"full": torch.ones(blocks, dtype=torch.bool)}
    for rate, survival in rules.items():
        # Steps that close nothing save nothing, and are not timed to learn that.
        drawn = (gates for step in count() if not (gates := draw(0, step, survival)).all())
        for number, gates in enumerate(islice(drawn, DRAWS)):
            patterns[f"{rate} {number}"] = gates
    run = caller(model, example)
    with preserve_state(model):
        model.train()

        def step(gates: Tensor) -> Tensor:
            with handle.forced(gates), torch.enable_grad():
                loss = sum_of_outputs(run())
                if loss is not None:  # something is trained
                    loss.backward()
            model.zero_grad()
            return torch.zeros(()) if loss is None else loss.detach()

        steps: dict[str, Callable[[], Tensor]] = {
            key: (lambda gates=gates: step(gates)) for key, gates in patterns.items()
        }
        rounds = list(take_turns(steps, repeats, warmup=1))
        kept = {key: saved_for_backward(one) for key, one in steps.items()}
    savings = []
    for rate, survival in rules.items():
        keys = [f"{rate} {number}" for number in range(DRAWS)]
        # Time and memory are scaled to the expected FLOPs saved, from those of the steps timed.
        timed = statistics.fmean(costs.saving(patterns[key].tolist()) for key in keys)
        expected = costs.saving(survival)
        time = 1 - statistics.median(
            statistics.fmean(r[key] for key in keys) / r["full"] for r in rounds
        )
        saved = kept["full"] - statistics.fmean(kept[key] for key in keys)
        memory = saved / kept["full"] if kept["full"] else 0.0  # nothing is kept if nothing trains
        scale = expected / timed if timed else 0.0
        savings.append(Saving(rate, expected, time * scale, memory * scale))
    return statistics.median(r["full"] for r in rounds), savings
