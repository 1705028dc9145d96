"""The engines that take training steps: autograd, compiled blocks, or the block program."""

import os
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from stochastic_depth.block_program import CudaGraphs, Eagerly, Program
from stochastic_depth.block_program.compiled import CompiledKernels
from stochastic_depth.block_program.kernels import Kernels
from stochastic_depth.block_program.library import private_cache
from stochastic_depth.block_program.native import NativeKernels
from stochastic_depth.handle import Handle
from stochastic_depth.train.engine_choice import KernelsName
from stochastic_depth.train.runtime import Runtime
from stochastic_depth.train.step import AutogradEngine, Measured, measured

KERNELS: dict[KernelsName, Callable[[torch.dtype], Kernels]] = {
    "reference": lambda dtype: Kernels(),
    "native": NativeKernels,
    "compiled": lambda dtype: CompiledKernels(),
}
"""The kernels by name. Each is called with the type of activations."""


class Engine(Protocol):
    """Takes training steps of one network."""

    def step(self, images: Tensor, labels: Tensor, weight: float = 1) -> Measured: ...

    @property
    def block_gradients(self) -> Sequence[Tensor | None]:
        """The gradient of each block's first convolution in the last step."""
        ...


class ProgramEngine:
    """Runs the block program on full mini-batches, and autograd on a smaller last one."""

    def __init__(
        self,
        model: nn.Module,
        handle: Handle | None,
        optimizer: torch.optim.SGD,
        first_weight: nn.Parameter,
        runtime: Runtime,
        shape: tuple[int, ...],
    ) -> None:
        device = torch.device(runtime.device)
        dtype = torch.bfloat16 if runtime.precision == "bfloat16" else first_weight.dtype
        self._shape = torch.Size(shape)
        self._program = Program(
            model,
            handle,
            optimizer,
            shape,
            dtype,
            KERNELS[runtime.kernels](dtype),
            CudaGraphs(device) if device.type == "cuda" else Eagerly(),
        )
        self._autograd = AutogradEngine(model, handle, optimizer, first_weight, runtime)
        self._was_full = True

    @property
    def kept(self) -> int:
        """How many bytes the last step kept for its backward pass."""
        return self._program.kept

    def step(self, images: Tensor, labels: Tensor, weight: float = 1) -> Measured:
        self._was_full = images.shape == self._shape
        if not self._was_full:
            return self._autograd.step(images, labels, weight)
        loss = self._program.step(images, labels)
        return measured(loss, self._program.stem_gradient)

    @property
    def block_gradients(self) -> Sequence[Tensor | None]:
        last = self._program if self._was_full else self._autograd
        return last.block_gradients


def build_engine(
    model: nn.Module,
    handle: Handle | None,
    optimizer: torch.optim.SGD,
    first_weight: nn.Parameter,
    runtime: Runtime,
    shape: tuple[int, ...],
) -> Engine:
    """The engine that `runtime` names.

    Args:
        shape: the shape of a full mini-batch, [batch, channels, height, width].
    """
    if "compiled" in (runtime.engine, runtime.kernels):
        # By default PyTorch uses a folder in /tmp that another user could guess and create first.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(private_cache() / "inductor"))
    if runtime.engine == "program":
        return ProgramEngine(model, handle, optimizer, first_weight, runtime, shape)
    compiled = runtime.engine == "compiled"
    return AutogradEngine(model, handle, optimizer, first_weight, runtime, compiled)
