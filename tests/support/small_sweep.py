"""Six runs of six steps: an eight-layer network on some of the embedded digits."""

from dataclasses import replace

from stochastic_depth.lab.sweep.grid import Grid
from stochastic_depth.recipes import RECIPES
from stochastic_depth.train import DataConfig, ModelConfig

GRID = Grid(rules=("linear", "constant"), survival=(0.3, 0.6), depths=(8,), seeds=(0, 1))
SMALL = replace(
    RECIPES["digits"](),
    data=DataConfig(train=300),
    model=ModelConfig(depth=8),
    epochs=2,
    evaluate_every=2,
)
