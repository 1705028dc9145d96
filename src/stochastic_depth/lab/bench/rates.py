"""What drop rates save on any model, in time and memory: measured for `inspect --report`."""

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
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
    blocks = len(costs.blocks)
    rules = {rate: survival_probabilities(LinearDecay(1 - rate), blocks) for rate in RATES}
    patterns: dict[str, Tensor] = {"full": torch.ones(blocks, dtype=torch.bool)}
    for rate, survival in rules.items():
        patterns.update(zip(_keys(rate), _first_closing(survival), strict=True))
    rounds, kept = _measure(model, example, patterns, repeats)
    savings = []
    for rate, survival in rules.items():
        # Time and memory are scaled to the expected FLOPs saved, from those of the steps timed.
        timed = statistics.fmean(costs.saving(patterns[key].tolist()) for key in _keys(rate))
        expected = costs.saving(survival)
        time = 1 - statistics.median(
            statistics.fmean(r[key] for key in _keys(rate)) / r["full"] for r in rounds
        )
        saved = kept["full"] - statistics.fmean(kept[key] for key in _keys(rate))
        memory = saved / kept["full"] if kept["full"] else 0.0  # nothing is kept if nothing trains
        scale = expected / timed if timed else 0.0
        savings.append(Saving(rate, expected, time * scale, memory * scale))
    return statistics.median(r["full"] for r in rounds), savings


def _keys(rate: float) -> list[str]:
    """The names of the sets of gates that are timed for a rate."""
    return [f"{rate} {number}" for number in range(DRAWS)]


def _first_closing(survival: tuple[float, ...]) -> Iterator[Tensor]:
    """The gates of the first `DRAWS` training steps that close a block, bool [L] each.

    Steps that close nothing save nothing, and are not timed to learn that.
    """
    drawn = (draw(0, step, survival) for step in count())
    return islice((gates for gates in drawn if not gates.all()), DRAWS)


def _measure(
    model: nn.Module, example: Any, patterns: Mapping[str, Tensor], repeats: int
) -> tuple[list[dict[str, float]], dict[str, int]]:
    """Take training steps under each set of gates, in turns.

    Returns:
        The seconds of each round, and the bytes that a step keeps for its backward pass.
    """
    handle = handle_of(model)
    run = caller(model, example)

    def step(gates: Tensor) -> Tensor:
        with handle.forced(gates), torch.enable_grad():
            loss = sum_of_outputs(run())
            if loss is not None:  # something is trained
                loss.backward()
        model.zero_grad()
        return torch.zeros(()) if loss is None else loss.detach()

    steps = {key: partial(step, gates) for key, gates in patterns.items()}
    with preserve_state(model):
        model.train()
        rounds = list(take_turns(steps, repeats, warmup=1))
        return rounds, {key: saved_for_backward(one) for key, one in steps.items()}
