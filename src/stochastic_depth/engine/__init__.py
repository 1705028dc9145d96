"""A training step as an explicit program over static buffers, which a GPU can replay as graphs."""

from stochastic_depth.engine.program import Program
from stochastic_depth.engine.replay import CudaGraphs, Eagerly

__all__ = ["CudaGraphs", "Eagerly", "Program"]
