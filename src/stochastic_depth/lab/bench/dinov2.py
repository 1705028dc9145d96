"""The subset gate against the block of DINOv2, which itself drops samples of its branches.

Its code is read from a checkout of github.com/facebookresearch/dinov2; none of it is included here.
"""

import importlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from stochastic_depth.errors import ConfigError
from stochastic_depth.lab.bench.costs import COSTS, StepCost, costs_table, costs_to_json, step_costs
from stochastic_depth.lab.bench.results import clock
from stochastic_depth.lab.bench.workload import Step, copy_weights, training_step
from stochastic_depth.lab.options import Dinov2Options
from stochastic_depth.lab.outcomes import CONSTANT
from stochastic_depth.randomness import generator
from stochastic_depth.surgery import apply
from stochastic_depth.survival import Uniform
from stochastic_depth.train.runtime import Runtime

THEIRS, OURS = "DINOv2's block", "subset gate, balanced"


class Stack(nn.Module):
    """Blocks, and a linear layer on the mean over tokens."""

    def __init__(self, blocks: list[nn.Module], width: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean(1))


@contextmanager
def _importable(checkout: Path) -> Iterator[None]:
    sys.path.insert(0, str(checkout))
    try:
        yield
    finally:
        sys.path.remove(str(checkout))


def their_block(checkout: Path) -> type[nn.Module]:
    """The class `Block` of a checkout of DINOv2.

    Raises:
        ConfigError: when it is not there.
    """
    if not (checkout / "dinov2/layers/block.py").is_file():
        raise ConfigError(
            f"--dinov2 is {checkout}, in which there is no dinov2/layers/block.py: give a checkout "
            "of https://github.com/facebookresearch/dinov2"
        )
    with _importable(checkout), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DINOv2 warns that xFormers is missing
        return importlib.import_module("dinov2.layers.block").Block


def dinov2_steps(rate: float, options: Dinov2Options, runtime: Runtime) -> dict[str, Step]:
    """A training step of each alternative, on the same weights and tokens."""
    block = their_block(options.dinov2)
    shape = {"dim": options.width, "num_heads": options.width // 64, "qkv_bias": True}
    x = torch.randn(options.batch, options.size, options.width, generator=generator("bench"))
    labels = torch.arange(options.batch) % 10
    steps: dict[str, Step] = {}
    first = None
    for name in (CONSTANT, THEIRS, OURS):
        drop = rate if name == THEIRS else 0.0
        blocks = [block(**shape, drop_path=drop) for _ in range(options.blocks)]
        model = Stack(blocks, options.width)
        first = first or model
        copy_weights(first, model)
        if name == OURS:
            apply(
                model,
                Uniform(1 - rate),
                example=x[:2],
                granularity="unit",
                gate="subset",
                balance=True,
                scale="training",
            )
        steps[name] = training_step(model, x, labels, runtime)
    return steps


@dataclass(frozen=True)
class Dinov2Result:
    """The costs of each alternative, by the drop rate of every block."""

    rates: Mapping[float, Mapping[str, StepCost]]
    clock: str

    def to_json(self) -> dict[str, Any]:
        rates = {f"{rate:g}": costs_to_json(costs, CONSTANT) for rate, costs in self.rates.items()}
        return {"clock": self.clock, "rates": rates}


def measure(options: Dinov2Options, runtime: Runtime, console: Console) -> Dinov2Result:
    """Time both at several drop rates, which are the same for every block."""
    rates = {
        rate: step_costs(
            lambda rate=rate: dinov2_steps(rate, options, runtime),
            options.repeats,
            runtime,
            console,
            counted=3,
        )
        for rate in options.rates
    }
    return Dinov2Result(rates, clock(runtime).__name__)


def tables(result: Dinov2Result, options: Dinov2Options, runtime: Runtime) -> Iterator[Table | str]:
    size = f"{options.blocks} blocks, batch {options.batch}, {options.size} tokens"
    for rate, costs in result.rates.items():
        yield costs_table(f"{size}, rate {rate:g}", costs, CONSTANT, runtime)
        yield f"ours is faster by {costs[THEIRS].seconds / costs[OURS].seconds:.2f} x"
    yield COSTS.format(CONSTANT)
