"""The subset gate against DINOv2's block, which itself drops samples of its branches.

    python tools/dinov2_block.py CHECKOUT --out results/bench/dinov2.json

CHECKOUT is one of https://github.com/facebookresearch/dinov2; none of its code is included here.
Training steps of both on the same weights and tokens, and at constant depth: the table of
docs/results/memory.md. Every block has the same drop rate.
"""

import argparse
import importlib
import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth.lab.bench.costs import COSTS, costs_table, costs_to_json, step_costs
from stochastic_depth.lab.bench.results import clock
from stochastic_depth.lab.bench.workload import Step, copy_weights, training_step
from stochastic_depth.lab.titles import CONSTANT
from stochastic_depth.randomness import generator
from stochastic_depth.train.config import Config
from stochastic_depth.train.runtime import Runtime, machine, resolve_runtime, versions

THEIRS, OURS = "DINOv2's block", "subset gate, balanced"
BLOCKS, WIDTH, BATCH, TOKENS = 12, 384, 16, 64


class Stack(nn.Module):
    """Blocks, and a linear layer on the mean over tokens."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean(1))


def build_steps(block: type[nn.Module], rate: float, runtime: Runtime) -> dict[str, Step]:
    """A training step of each alternative, on the same weights and tokens."""
    shape = {"dim": WIDTH, "num_heads": WIDTH // 64, "qkv_bias": True}
    x = torch.randn(BATCH, TOKENS, WIDTH, generator=generator("bench"))
    steps: dict[str, Step] = {}
    models: list[nn.Module] = []
    for name in (CONSTANT, THEIRS, OURS):
        drop = rate if name == THEIRS else 0.0
        models.append(Stack([block(**shape, drop_path=drop) for _ in range(BLOCKS)]))
        copy_weights(models[0], models[-1])
        if name == OURS:
            sd.apply(
                models[-1],
                sd.Uniform(1 - rate),
                example=x[:2],
                granularity="unit",
                gate="subset",
                balance=True,
                scale="training",
            )
        steps[name] = training_step(models[-1], x, torch.arange(BATCH) % 10, runtime)
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4])
    parser.add_argument("--repeats", type=int, default=20, help="how many rounds are timed")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    asked = parser.parse_args()
    if not (asked.checkout / "dinov2/layers/block.py").is_file():
        parser.error(f"{asked.checkout} has no dinov2/layers/block.py: give a checkout of DINOv2")
    sys.path.insert(0, str(asked.checkout))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DINOv2 warns that xFormers is missing
        block = importlib.import_module("dinov2.layers.block").Block
    runtime, console = resolve_runtime(Config(engine="eager")), Console()
    rates = {}
    for rate in asked.rates:
        costs = step_costs(
            lambda rate=rate: build_steps(block, rate, runtime),
            asked.repeats,
            runtime,
            console,
            counted=3,
        )
        title = f"{BLOCKS} blocks, batch {BATCH}, {TOKENS} tokens, rate {rate:g}"
        console.print(costs_table(title, costs, CONSTANT, runtime))
        console.print(f"ours is faster by {costs[THEIRS].seconds / costs[OURS].seconds:.2f} x")
        rates[f"{rate:g}"] = costs_to_json(costs, CONSTANT)
    console.print(COSTS.format(CONSTANT))
    if asked.out:
        found = {
            "settings": {"repeats": asked.repeats, "rates": asked.rates},
            "runtime": asdict(runtime),
            "machine": machine(runtime),
            "versions": versions(),
            "clock": clock(runtime).__name__,
            "rates": rates,
        }
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
