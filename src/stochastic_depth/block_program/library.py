"""The native kernels as a library: compiled on first use, loaded, and called through ctypes."""

import ctypes
import functools
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, c_float, c_int, c_long, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stochastic_depth.block_program.kernels import Layer, Linear
from stochastic_depth.errors import EngineError

SOURCE = Path(__file__).with_name("cpp") / "kernels.cpp"
MOST_THREADS = 64
"""At most 64, because `threads.h` has a bit for each."""
FLAGS = (
    *("-O3", "-march=native", "-mtune=generic", "-pthread", "-shared", "-fPIC", "-std=c++17"),
    f"-DMOST_THREADS={MOST_THREADS}",
)
WITHOUT_TILES = ("-mno-amx-bf16", "-mno-avx512bf16")
"""Used when the operating system denies AMX. On processors with AMX the AVX512-BF16 dot product is
half as fast as the float32 FMA, so that is disabled too."""
DEFINED = {torch.bfloat16: (), torch.float32: ("-DFLOAT32",)}
"""The flags for each type in which images are stored."""


def why_unavailable() -> str | None:
    """Why native kernels cannot be compiled here; None if they can."""
    if _compiler() is None:
        return "no C++ compiler was found (g++, or the one that CXX names)"
    return None


def why_unmeasured() -> str | None:
    """Why native kernels may not be faster on this processor; None if they are."""
    processor = cpu_capabilities()
    if processor.get("avx2") or processor.get("avx512_f"):
        return None
    known = "has neither" if processor else "may have neither (this PyTorch does not list them)"
    return f"they have been measured on processors with AVX2 or AVX-512, and this one {known}"


def cpu_capabilities() -> Mapping[str, Any]:
    """The processor's instruction sets and name; empty if this version of PyTorch lists none."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def peak(dtype: torch.dtype, threads: int = 1) -> float:
    """The peak FLOP/s of this processor, measured with a loop of independent multiply-adds.

    A multiply-add counts as 2 FLOPs. It is the best of nine runs of some milliseconds.

    Args:
        dtype: of images. Products are of bfloat16 if this is bfloat16 and the processor has an
            instruction for it, of float32 otherwise.
    """
    values, rounds = torch.zeros(threads, 64), 2_000_000
    run_multiply_adds = library(dtype).run_multiply_adds

    def run(row: Tensor) -> float:
        began = time.thread_time()  # processor time, so that other processes do not count
        return run_multiply_adds(row.data_ptr(), rounds) / (time.thread_time() - began)

    with ThreadPoolExecutor(threads) as pool:
        return max(sum(pool.map(run, values)) for _ in range(9))


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The compiled kernels, from the cache folder if they were compiled before.

    Args:
        dtype: of images, bfloat16 or float32.

    Raises:
        EngineError: when they cannot be compiled, with the reason.
    """
    reason = why_unavailable()
    if reason is not None:
        raise EngineError(
            f"native kernels: {reason}: begin a run with --engine eager; or install one, and "
            "resume this run"
        )
    loaded = _loaded((*FLAGS, *DEFINED[dtype]))
    if not loaded.permitted():
        loaded = _loaded((*FLAGS, *WITHOUT_TILES, *DEFINED[dtype]))
    return loaded


def _loaded(flags: Sequence[str]) -> ctypes.CDLL:
    """The kernels as compiled with `flags`."""
    compiler = _compiler()
    assert compiler is not None
    # Its predefined macros name its version and what -march=native stands for on this processor.
    command = [compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull]
    macros = subprocess.run(command, capture_output=True, text=True).stdout
    sources = (path.read_text() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h"))))
    key = "\0".join([*sources, compiler, *flags, macros])
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    cache = private_cache()
    path = cache / f"native-{name}.so"
    try:
        if not (path.is_file() and only_we_write(path)):
            _compile([compiler, *flags], path)
        return declare(ctypes.CDLL(str(path)))
    except OSError as error:
        raise EngineError(
            f"native kernels: {error}; remove {path}, or begin a run with --engine eager"
        ) from error


def _compile(compiler: Sequence[str], path: Path) -> None:
    """Compile the library to `path`, where nobody ever sees an incomplete file."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        command = [*compiler, "-o", str(built), str(SOURCE)]
        outcome = subprocess.run(command, capture_output=True, text=True)
        if outcome.returncode:
            lines = outcome.stderr.strip().splitlines() or [f"it ended with {outcome.returncode}"]
            reason = next((line for line in lines if "error" in line), lines[0])
            raise EngineError(
                f"native kernels: {compiler[0]} failed: {reason}: begin a run with --engine eager; "
                "or name another compiler by the environment variable CXX, and resume this run"
            )
        built.chmod(0o700)
        with built.open("rb") as file:
            os.fsync(file.fileno())
        built.replace(path)


def private_cache() -> Path:
    """`stochastic-depth` in the user's cache folder; created if necessary, private to the user.

    Raises:
        EngineError: when it belongs to a different user, or cannot be created.
    """
    try:
        above = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = above / "stochastic-depth"
        above.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        if not folder.is_dir() or not is_ours(folder):
            raise EngineError(
                f"{folder} is not a folder of yours, and what it holds would be run: remove it, or "
                "set XDG_CACHE_HOME to a folder of your own"
            )
        folder.chmod(0o700)
    except (OSError, RuntimeError) as error:
        raise EngineError(
            f"there is no folder for compiled code ({error}): set XDG_CACHE_HOME to one that can "
            "be written, or begin a run with --engine eager"
        ) from error
    return folder


def is_ours(path: Path) -> bool:
    """Whether it belongs to this user, and is not a link."""
    found = path.lstat()
    return found.st_uid == os.geteuid() and not stat.S_ISLNK(found.st_mode)


def only_we_write(path: Path) -> bool:
    """Whether only this user can have written the file."""
    return is_ours(path) and not path.lstat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


class CNorm(ctypes.Structure):
    """`Norm` of `statistics.h`."""

    _fields_ = [
        *((name, c_void_p) for name in ("weight", "bias", "grad_weight", "grad_bias")),
        *((name, c_void_p) for name in ("running_mean", "running_var")),
        *((name, c_void_p) for name in ("mean", "rstd", "scale", "shift")),
        *((name, c_float) for name in ("momentum", "eps", "factor")),
    ]


class CLayer(ctypes.Structure):
    """`Layer` of `kernels.cpp`."""

    _fields_ = [("weight", c_void_p), ("grad_weight", c_void_p), ("norm", CNorm)]


class CInput(ctypes.Structure):
    """`Input` of `passes.h`: the input x of a convolution.

    If `y` is set, x is computed from `y` and `shortcut` while it is read.
    """

    _fields_ = [("x", c_void_p), ("y", c_void_p), ("shortcut", c_void_p), ("norm", POINTER(CNorm))]


class CLinear(ctypes.Structure):
    """`Linear` of `passes.h`."""

    _fields_ = [
        *((name, c_void_p) for name in ("weight", "bias", "grad_weight", "grad_bias")),
        ("classes", c_int),
    ]


_IMAGES = (c_int, c_int, c_int, c_int)  # number, side, channels, threads
_ROWS = (c_long, c_int, c_int)  # pixels, channels, threads
_POOLED = (c_int, c_int, c_int, c_int, c_int)  # rows, columns, channels of both, threads
_SIGNATURES = {
    "convolve3x3": (POINTER(CInput), POINTER(CLayer), c_void_p, c_int, *_IMAGES),  # c_int: stride
    "convolve3x3_backward": (POINTER(CInput), POINTER(CLayer), *[c_void_p] * 6, c_int, *_IMAGES),
    "convolve_stem": (c_void_p, POINTER(CLayer), c_void_p, *_IMAGES),
    "convolve_stem_backward": (c_void_p, POINTER(CLayer), *[c_void_p] * 3, *_IMAGES),
    "batch_statistics": (c_void_p, POINTER(CLayer), *_ROWS),
    "batch_norm_input_gradient": (c_void_p, POINTER(CLayer), *[c_void_p] * 3, *_ROWS),
    "batch_norm_relu": (POINTER(CInput), *_ROWS),
    "relu_backward": (POINTER(CInput), c_void_p, c_void_p, *_ROWS),
    "classify": (c_void_p, POINTER(CLinear), *[c_void_p] * 3, *_IMAGES),  # pixels for the side
    "pool_and_pad": (c_void_p, c_void_p, *_POOLED),
    "pool_and_pad_backward": (c_void_p, c_void_p, *_POOLED),
}


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the arguments of the functions of `library`, so that ctypes checks them."""
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    library.fits_images.argtypes = c_int, c_int, c_int  # side, channels, stride
    library.run_multiply_adds.argtypes = c_void_p, c_long
    library.run_multiply_adds.restype = c_long
    return library


def c_layer(layer: Layer) -> tuple[CLayer, Tensor]:
    """`layer` as a C structure, and memory for its mean, rstd, scale and shift: [4, channels]."""
    norm, channels = layer.norm, layer.weight.shape[0]
    statistics = torch.empty(4, channels)
    norm.mean, norm.rstd = statistics[:2].unbind()
    parameters = norm.weight, norm.bias, norm.weight_gradient, norm.bias_gradient
    tensors = (*parameters, norm.running_mean, norm.running_var, *statistics.unbind())
    pointers = (tensor.data_ptr() for tensor in tensors)
    c_norm = CNorm(*pointers, norm.momentum, norm.eps, 1.0)
    return CLayer(layer.weight.data_ptr(), layer.weight_gradient.data_ptr(), c_norm), statistics


def c_linear(layer: Linear) -> CLinear:
    """`layer` as a C structure."""
    tensors = layer.weight, layer.bias, layer.weight_gradient, layer.bias_gradient
    return CLinear(*(tensor.data_ptr() for tensor in tensors), len(layer.bias))
