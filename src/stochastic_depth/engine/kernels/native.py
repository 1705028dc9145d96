"""The kernels of `native.cpp`, compiled on first use, where processor and compiler are there."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from stochastic_depth.engine.kernels.kernels import BatchNorm, Layer
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
    """bfloat16 on a CPU: convolutions close to the processor's peak, which compute on the way what
    normalisation and ReLU make of their input, so that it is neither stored nor read again.

    A branch keeps the results of its two convolutions, nothing else. Sums are in float32 and
    rounded once, so results differ from the reference's in the last bits of bfloat16. What is not
    of a form for it (strides, other numbers of channels, other types) the reference computes.

    Raises:
        EngineError: where it cannot be compiled, saying why.
    """

    def __init__(self) -> None:
        self._library = _library()
        self._threads = torch.get_num_threads()

    def branch(
        self, x: Tensor, first: Layer, second: Layer, shortcut: Tensor, out: Tensor
    ) -> tuple[Tensor, ...]:
        if not self._fits(x, first) or not self._fits(out, second):
            return super().branch(x, first, second, shortcut, out)
        a = self._convolve(x, first)
        affine = self._observe(a, first.norm)
        c = self._convolve(a, second, affine)
        last = self._observe(c, second.norm)
        self._library.activate(_at(c), *_two(last), _at(shortcut), _at(out), *self._rows(c))
        return a, c, affine

    def branch_backward(
        self,
        saved: tuple[Tensor, ...],
        x: Tensor,
        first: Layer,
        second: Layer,
        out: Tensor,
        gradient: Tensor,
        of_shortcut: Callable[[], Tensor],
    ) -> None:
        if len(saved) != 3 or saved[2].ndim != 2:
            super().branch_backward(saved, x, first, second, out, gradient, of_shortcut)
            return
        a, c, affine = saved
        of_b = torch.empty_like(a)
        by = self._reduce(gradient, c, second.norm, out=out)
        self._convolve_backward(a, affine, second, gradient, c, by, None, None, of_b)
        by = self._reduce(of_b, a, first.norm, affine=affine)
        of_x = of_shortcut()
        self._convolve_backward(x, None, first, of_b, a, by, affine, of_x, of_x)

    def _convolve(self, x: Tensor, layer: Layer, affine: Tensor | None = None) -> Tensor:
        """The convolution of x, or of ReLU(x * scale + shift)."""
        out = torch.empty_like(x)
        n, channels, side, _ = x.shape
        self._library.convolve3x3(
            _at(x),
            *_two(affine),
            _at(layer.weight),
            _at(out),
            n,
            side,
            channels,
            self._threads,
        )
        return out

    def _convolve_backward(
        self,
        x: Tensor,
        affine: Tensor | None,
        layer: Layer,
        gradient: Tensor,
        y: Tensor,
        by: Tensor,
        y_affine: Tensor | None,
        added: Tensor | None,
        of_x: Tensor,
    ) -> None:
        """Both gradients of the convolution y of x, from that of y's normalisation."""
        n, channels, side, _ = x.shape
        self._library.convolve3x3_backward(
            _at(x),
            *_two(affine),
            _at(gradient),
            _at(y),
            _at(by),
            *_two(y_affine),
            _at(layer.weight),
            _at(layer.weight_gradient),
            _at(added),
            _at(of_x),
            n,
            side,
            channels,
            self._threads,
        )

    def _observe(self, x: Tensor, norm: BatchNorm) -> Tensor:
        """Note the statistics of x; gives scale and shift, float32 [2, channels]."""
        channels = x.shape[1]
        norm.mean, norm.rstd = torch.empty(2, channels).unbind()
        affine = torch.empty(2, channels)
        self._library.observe(
            _at(x),
            _at(norm.weight),
            _at(norm.bias),
            _at(norm.running_mean),
            _at(norm.running_var),
            _at(norm.mean),
            _at(norm.rstd),
            *_two(affine),
            ctypes.c_float(norm.momentum),
            ctypes.c_float(norm.eps),
            _factor(norm),
            *self._rows(x),
        )
        return affine

    def _reduce(
        self,
        gradient: Tensor,
        x: Tensor,
        norm: BatchNorm,
        out: Tensor | None = None,
        affine: Tensor | None = None,
    ) -> Tensor:
        """Gradients of weight and bias; gives the coefficients of that of x, [3, channels]."""
        by = torch.empty(3, x.shape[1])
        self._library.reduce(
            _at(gradient),
            _at(out),
            _at(x),
            _at(norm.weight),
            _at(norm.mean),
            _at(norm.rstd),
            *_two(affine),
            _at(norm.weight_gradient),
            _at(norm.bias_gradient),
            _at(by),
            _factor(norm),
            *self._rows(x),
        )
        return by

    def _rows(self, x: Tensor) -> tuple[ctypes.c_long, int, int]:
        """Number of pixels, channels, threads."""
        return ctypes.c_long(x.numel() // x.shape[1]), x.shape[1], self._threads

    @staticmethod
    def _fits(x: Tensor, layer: Layer) -> bool:
        (out, into), (height, width) = layer.weight.shape[:2], x.shape[2:]
        return (
            x.dtype == torch.bfloat16
            and x.is_contiguous(memory_format=torch.channels_last)
            and layer.stride == 1
            and x.shape[1] == out == into
            and out in (16, 32, 64)
            and height == width
            and width % (16 if out == 16 else 8) == 0
        )


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _two(pair: Tensor | None) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    """The rows of [2, channels], or nothing."""
    return (_at(None), _at(None)) if pair is None else (_at(pair[0]), _at(pair[1]))


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
