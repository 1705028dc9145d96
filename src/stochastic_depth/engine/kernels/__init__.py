"""The arithmetic of a residual block: one interface, with PyTorch's operators as the reference."""

from stochastic_depth.engine.kernels.compiled import CompiledKernels
from stochastic_depth.engine.kernels.kernels import BatchNorm, Kernels, Layer, Linear
from stochastic_depth.engine.kernels.native import NativeKernels
from stochastic_depth.engine.kernels.reference import ReferenceKernels

__all__ = [
    "BatchNorm",
    "CompiledKernels",
    "Kernels",
    "Layer",
    "Linear",
    "NativeKernels",
    "ReferenceKernels",
]
