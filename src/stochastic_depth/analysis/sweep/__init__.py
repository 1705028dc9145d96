"""Sweeps: many independent runs over a grid, by as many processes as one likes."""

from stochastic_depth.analysis.sweep.folder import Sweep, open_sweep
from stochastic_depth.analysis.sweep.grid import Grid, Point
from stochastic_depth.analysis.sweep.progress import Progress
from stochastic_depth.analysis.sweep.queue import Queue
from stochastic_depth.analysis.sweep.table import sweep_table
from stochastic_depth.analysis.sweep.worker import Workers, work

__all__ = [
    "Grid",
    "Point",
    "Progress",
    "Queue",
    "Sweep",
    "Workers",
    "open_sweep",
    "sweep_table",
    "work",
]
