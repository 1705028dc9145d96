"""The figures, one a file: each a pure function from data to what is drawn."""

from stochastic_depth.report.figures.active_blocks import active_blocks
from stochastic_depth.report.figures.block_gradients import block_gradients
from stochastic_depth.report.figures.depth_cost import depth_cost
from stochastic_depth.report.figures.depth_sweep import depth_sweep
from stochastic_depth.report.figures.ensemble import ensemble
from stochastic_depth.report.figures.gradient_strength import gradient_strength
from stochastic_depth.report.figures.removed_blocks import removed_blocks
from stochastic_depth.report.figures.survival_sweep import survival_sweep
from stochastic_depth.report.figures.training_curves import training_curves
from stochastic_depth.report.figures.training_time import training_time

__all__ = [
    "active_blocks",
    "block_gradients",
    "depth_cost",
    "depth_sweep",
    "ensemble",
    "gradient_strength",
    "removed_blocks",
    "survival_sweep",
    "training_curves",
    "training_time",
]
