"""The engines that take training steps: autograd, compiled blocks, or the block program."""

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stochastic_depth.block_program import CudaGraphs, Eagerly, Program
from stochastic_depth.block_program.compiled import CompiledKernels
from stochastic_depth.block_program.kernels import Kernels
from stochastic_depth.block_program.library import private_cache
from stochastic_depth.block_program.native import NativeKernels
from stochastic_depth.distributed import skip_closed
from stochastic_depth.distributed.world import world_size
from stochastic_depth.handle import Handle
from stochastic_depth.surgery import compile_blocks
from stochastic_depth.train.build import (
    block_convolutions,
    first_convolution,
    handle_or_always_open,
)
from stochastic_depth.train.engine_choice import KernelsName
from stochastic_depth.train.runtime import Runtime
from stochastic_depth.train.step import StepMetrics, step_metrics, train_step

KERNELS: dict[KernelsName, Callable[[torch.dtype], Kernels]] = {
    "reference": lambda dtype: Kernels(),
    "native": NativeKernels,
    "compiled": lambda dtype: CompiledKernels(),
}
"""The kernels by name. Each is called with the type of activations."""

_SYNCHRONISES_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"  # its name in older versions of PyTorch
)
_DDP_OPTIONS: dict[str, Any] = {
    "gradient_as_bucket_view": True,
    # BatchNorm statistics are copied between ranks at evaluations, not in every step.
    _SYNCHRONISES_BUFFERS: False,
}


class Engine(Protocol):
    """Takes training steps of one network."""

    def step(self, images: Tensor, labels: Tensor, weight: float = 1) -> StepMetrics: ...

    @property
    def block_gradients(self) -> Sequence[Tensor | None]:
        """The gradient of each block's first convolution in the last step."""
        ...


class AutogradEngine:
    """Takes training steps by PyTorch's autograd, with or without compiled blocks."""

    def __init__(
        self,
        model: nn.Module,
        handle: Handle | None,
        optimizer: torch.optim.Optimizer,
        runtime: Runtime,
        compiled: bool = False,
    ) -> None:
        self._model, self._optimizer, self._runtime = model, optimizer, runtime
        self._first_weight = first_convolution(model)
        self._convolutions = block_convolutions(model)
        if compiled:
            handle_or_always_open(model)  # only blocks are compiled
            compile_blocks(model)
        if world_size() > 1:
            self._model = DistributedDataParallel(model, **_DDP_OPTIONS)
            if handle is not None:
                skip_closed(self._model)

    def step(self, images: Tensor, labels: Tensor, weight: float = 1) -> StepMetrics:
        return train_step(
            self._model, self._optimizer, images, labels, self._first_weight, self._runtime, weight
        )

    @property
    def block_gradients(self) -> Sequence[Tensor | None]:
        return [weight.grad for weight in self._convolutions]


class ProgramEngine:
    """Runs the block program on full mini-batches, and autograd on a smaller last one."""

    def __init__(
        self,
        model: nn.Module,
        handle: Handle | None,
        optimizer: torch.optim.SGD,
        runtime: Runtime,
        shape: tuple[int, ...],
    ) -> None:
        self._shape = torch.Size(shape)
        self._program = Program(
            model,
            handle,
            optimizer,
            shape,
            runtime.dtype,
            KERNELS[runtime.kernels](runtime.dtype),
            CudaGraphs(torch.device(runtime.device)) if runtime.on_gpu else Eagerly(),
        )
        self._autograd = AutogradEngine(model, handle, optimizer, runtime)
        self._was_full = True

    @property
    def bytes_saved(self) -> int:
        """How many bytes the last step saved for its backward pass."""
        return self._program.bytes_saved

    def step(self, images: Tensor, labels: Tensor, weight: float = 1) -> StepMetrics:
        self._was_full = images.shape == self._shape
        if not self._was_full:
            return self._autograd.step(images, labels, weight)
        loss = self._program.step(images, labels)
        return step_metrics(loss, self._program.stem_gradient)

    @property
    def block_gradients(self) -> Sequence[Tensor | None]:
        last = self._program if self._was_full else self._autograd
        return last.block_gradients


def build_engine(
    model: nn.Module,
    handle: Handle | None,
    optimizer: torch.optim.SGD,
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
        return ProgramEngine(model, handle, optimizer, runtime, shape)
    return AutogradEngine(model, handle, optimizer, runtime, runtime.engine == "compiled")
