"""The kernels of `native.cpp`, compiled on first use, where processor and compiler are there."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from stochastic_depth.engine.kernels.kernels import BatchNorm
from stochastic_depth.engine.kernels.reference import ReferenceKernels
from stochastic_depth.errors import EngineError

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c++17")


def missing() -> str | None:
    """Why native kernels cannot be had here; None where they can."""
    processor = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if not processor.get("avx512_bf16"):
        return "the processor has no AVX512-BF16"
    if _compiler() is None:
        return "no C++ compiler was found (g++, or the one that CXX names)"
    return None


class NativeKernels(ReferenceKernels):
    """bfloat16 on a CPU: each convolution close to the processor's peak, and each normalisation
    with the ReLU and the addition that follow it in two passes over the data.

    Weight gradients are float32 from the start, and sums are rounded once, so results differ from
    the reference's in the last bits of bfloat16. What is of no form for it (strides, other numbers
    of channels, other types) is computed by the reference.

    Raises:
        EngineError: where it cannot be compiled, saying why.
    """

    def __init__(self) -> None:
        self._library = _library()
        self._threads = torch.get_num_threads()

    def convolve(self, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        if not self._fits(x, weight, stride):
            return super().convolve(x, weight, stride)
        return self._convolved(x, weight, torch.empty_like(x), transposed=False)

    def convolve_backward(
        self,
        gradient: Tensor,
        x: Tensor,
        weight: Tensor,
        stride: int,
        weight_gradient: Tensor,
        add_to: Tensor | None = None,
        needs_input: bool = True,
    ) -> Tensor | None:
        if not self._fits(x, weight, stride):
            return super().convolve_backward(
                gradient, x, weight, stride, weight_gradient, add_to, needs_input
            )
        n, channels, side, _ = x.shape
        self._library.weight_gradient3x3(
            _at(x), _at(gradient), _at(weight_gradient), n, side, channels, self._threads
        )
        if not needs_input:
            return None
        out = torch.empty_like(x) if add_to is None else add_to
        return self._convolved(gradient, weight, out, transposed=True, added=add_to)

    def normalise(
        self, x: Tensor, norm: BatchNorm, shortcut: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        if not _is_image(x):
            return super().normalise(x, norm, shortcut, out)
        out = torch.empty_like(x) if out is None else out
        norm.mean, norm.rstd = torch.empty_like(norm.weight), torch.empty_like(norm.weight)
        channels = x.shape[1]
        self._library.normalise(
            _at(x),
            _at(shortcut),
            _at(out),
            _at(norm.weight),
            _at(norm.bias),
            _at(norm.running_mean),
            _at(norm.running_var),
            _at(norm.mean),
            _at(norm.rstd),
            ctypes.c_float(norm.momentum),
            ctypes.c_float(norm.eps),
            _factor(norm),
            ctypes.c_long(x.numel() // channels),
            channels,
            self._threads,
        )
        return out

    def normalise_backward(
        self, gradient: Tensor, out: Tensor, x: Tensor, norm: BatchNorm, has_shortcut: bool
    ) -> Tensor:
        if not _is_image(x):
            return super().normalise_backward(gradient, out, x, norm, has_shortcut)
        of_x = torch.empty_like(x)
        channels = x.shape[1]
        self._library.normalise_backward(
            _at(gradient),
            _at(out),
            _at(x),
            _at(gradient if has_shortcut else None),
            _at(of_x),
            _at(norm.weight),
            _at(norm.mean),
            _at(norm.rstd),
            _at(norm.weight_gradient),
            _at(norm.bias_gradient),
            _factor(norm),
            ctypes.c_long(x.numel() // channels),
            channels,
            self._threads,
        )
        return of_x

    def _convolved(
        self,
        x: Tensor,
        weight: Tensor,
        out: Tensor,
        transposed: bool,
        added: Tensor | None = None,
    ) -> Tensor:
        n, channels, side, _ = x.shape
        self._library.convolve3x3(
            _at(x),
            _at(weight),
            int(transposed),
            _at(added),
            _at(out),
            n,
            side,
            channels,
            self._threads,
        )
        return out

    @staticmethod
    def _fits(x: Tensor, weight: Tensor, stride: int) -> bool:
        out, into, height, width = *weight.shape[:2], *x.shape[2:]
        tile = 16 if out == 16 else 8
        return (
            _is_image(x)
            and stride == 1
            and out == into
            and out in (16, 32, 64)
            and height == width
            and width % tile == 0
        )


def _is_image(x: Tensor) -> bool:
    """Whether it is bfloat16, channels_last, and in sixteens of channels."""
    return (
        x.dtype == torch.bfloat16
        and x.shape[1] % 16 == 0
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _factor(norm: BatchNorm) -> ctypes.c_float:
    return ctypes.c_float(1.0 if norm.factor is None else norm.factor.item())


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


@functools.cache
def _library() -> ctypes.CDLL:
    """The compiled kernels, from the cache folder if they were compiled before."""
    reason = missing()
    if reason is not None:
        raise EngineError(f"native kernels: {reason}; use --engine eager")
    compiler = _compiler()
    assert compiler is not None
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    made_of = [SOURCE.read_text(), version, *FLAGS, repr(torch.cpu.get_capabilities())]
    name = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stochastic-depth"
    path = cache / f"native-{name}.so"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            made = Path(folder) / path.name
            command = [compiler, *FLAGS, "-o", str(made), str(SOURCE)]
            outcome = subprocess.run(command, capture_output=True, text=True)
            if outcome.returncode:
                raise EngineError(
                    f"native kernels: {compiler} failed: {outcome.stderr.strip().splitlines()[0]}; "
                    "use --engine eager"
                )
            made.replace(path)
    return ctypes.CDLL(str(path))
