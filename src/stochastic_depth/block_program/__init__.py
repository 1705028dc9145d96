"""A training step as an explicit program over static buffers, which a GPU can replay as graphs."""

from stochastic_depth.block_program.pieces import CudaGraphs, Eagerly
from stochastic_depth.block_program.program import Program

__all__ = ["CudaGraphs", "Eagerly", "Program"]
