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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, c_float, c_int, c_long, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from stochastic_depth.block_program.kernels import Layer, Linear
from stochastic_depth.errors import EngineError

SOURCE = Path(__file__).with_name("cpp") / "kernels.cpp"
FLAGS = ("-O3", "-march=native", "-mtune=generic", "-pthread", "-shared", "-fPIC", "-std=c++17")
WITHOUT_TILES = ("-mno-amx-bf16", "-mno-avx512bf16")
"""Where the system does not let a process use tiles. Processors that have them take twice as long
for the other product of bfloat16, of vectors, as for that of float32."""
MOST_THREADS = 64
"""That of `threads.h`."""
DEFINED = {torch.bfloat16: (), torch.float32: ("-DFLOAT32",)}
"""Types in which images are stored, by their names in the C++ source."""


def missing() -> str | None:
    """Why native kernels cannot be compiled here; None where they can."""
    if _compiler() is None:
        return "no C++ compiler was found (g++, or the one that CXX names)"
    return None


def unmeasured() -> str | None:
    """Why native kernels may not be faster on this processor; None where they are."""
    processor = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if not (processor.get("avx2") or processor.get("avx512_f")):
        return "they have been measured on processors with AVX2 or AVX-512, and this has neither"
    return None


def peak(dtype: torch.dtype, threads: int = 1, repeats: int = 9) -> float:
    """FLOP/s of a loop of independent multiply-adds: the most that kernels could reach.

    A multiply-add counts as 2 FLOPs. The best of `repeats` runs of some milliseconds.

    Args:
        dtype: what images would be stored in: products are of bfloat16 where the processor has an
            instruction for it and this is bfloat16, of float32 otherwise.
    """
    values, rounds = torch.zeros(threads, 64), 2_000_000
    multiply = library(dtype).multiply

    def run(row: Tensor) -> float:
        began = time.thread_time()  # of the processor, so that others do not count
        return multiply(row.data_ptr(), rounds) / (time.thread_time() - began)

    with ThreadPoolExecutor(threads) as pool:
        return max(sum(pool.map(run, values)) for _ in range(repeats))


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The compiled kernels, from the cache folder if they were compiled before.

    Args:
        dtype: of images, bfloat16 or float32.

    Raises:
        EngineError: where they cannot be compiled, saying why.
    """
    reason = missing()
    if reason is not None:
        raise EngineError(f"native kernels: {reason}; use --engine eager")
    loaded = _loaded((*FLAGS, *DEFINED[dtype]))
    if not loaded.permitted():
        loaded = _loaded((*FLAGS, *WITHOUT_TILES, *DEFINED[dtype]))
    return loaded


def _loaded(flags: Sequence[str]) -> ctypes.CDLL:
    """The kernels as compiled with `flags`."""
    compiler = _compiler()
    assert compiler is not None
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    made_of = [
        *(path.read_text() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))),
        compiler,
        version,
        *flags,
        repr(torch.cpu.get_capabilities()),
    ]
    name = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    cache = private_cache()
    path = cache / f"native-{name}.so"
    try:
        if not (path.is_file() and only_we_write(path)):
            _compile([compiler, *flags], path)
        return declare(ctypes.CDLL(str(path)))
    except OSError as error:
        raise EngineError(
            f"native kernels: {error}; remove {path}, or use --engine eager"
        ) from error


def _compile(compiler: Sequence[str], path: Path) -> None:
    """Compile the library to `path`, which is complete or does not exist."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [*compiler, "-o", str(made), str(SOURCE)]
        outcome = subprocess.run(command, capture_output=True, text=True)
        if outcome.returncode:
            said = outcome.stderr.strip().splitlines() or [f"it ended with {outcome.returncode}"]
            reason = next((line for line in said if "error" in line), said[0])
            raise EngineError(f"native kernels: {compiler[0]} failed: {reason}; use --engine eager")
        made.chmod(0o700)
        with made.open("rb") as file:
            os.fsync(file.fileno())
        made.replace(path)


def private_cache() -> Path:
    """`stochastic-depth` in the user's cache folder, made if need be, readable by its owner alone.

    Raises:
        EngineError: when it is another user's, or cannot be made.
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
            "be written, or use --engine eager"
        ) from error
    return folder


def is_ours(path: Path) -> bool:
    """Whether it belongs to this user, and is no link."""
    found = path.lstat()
    return found.st_uid == os.geteuid() and not stat.S_ISLNK(found.st_mode)


def only_we_write(path: Path) -> bool:
    """Whether nobody but this user can have written the file."""
    return is_ours(path) and not path.lstat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


class CNorm(ctypes.Structure):
    """`Norm` of `statistics.h`."""

    _fields_ = [
        *((name, c_void_p) for name in ("weight", "bias", "of_weight", "of_bias")),
        *((name, c_void_p) for name in ("running_mean", "running_var")),
        *((name, c_void_p) for name in ("mean", "rstd", "scale", "shift")),
        *((name, c_float) for name in ("momentum", "eps", "factor")),
    ]


class CLayer(ctypes.Structure):
    """`Layer` of `kernels.cpp`."""

    _fields_ = [("weight", c_void_p), ("of_weight", c_void_p), ("norm", CNorm)]


class CInput(ctypes.Structure):
    """`Input` of `kernels.cpp`: what is convolved, x, which may be made of others on the way."""

    _fields_ = [("x", c_void_p), ("y", c_void_p), ("shortcut", c_void_p), ("norm", POINTER(CNorm))]


class CLinear(ctypes.Structure):
    """`Linear` of `passes.h`."""

    _fields_ = [
        *((name, c_void_p) for name in ("weight", "bias", "of_weight", "of_bias")),
        ("classes", c_int),
    ]


_IMAGES = (c_int, c_int, c_int, c_int)  # number, side, channels, threads
_ROWS = (c_long, c_int, c_int)  # pixels, channels, threads
_POOLED = (c_int, c_int, c_int, c_int, c_int)  # rows, columns, channels of both, threads
_SIGNATURES = {
    "convolve3x3": (POINTER(CInput), POINTER(CLayer), c_void_p, c_int, *_IMAGES),  # c_int: stride
    "convolve3x3_backward": (POINTER(CInput), POINTER(CLayer), *[c_void_p] * 6, c_int, *_IMAGES),
    "convolve_pictures": (c_void_p, POINTER(CLayer), c_void_p, *_IMAGES),
    "convolve_pictures_backward": (c_void_p, POINTER(CLayer), *[c_void_p] * 3, *_IMAGES),
    "observe": (c_void_p, POINTER(CLayer), *_ROWS),
    "observe_backward": (c_void_p, POINTER(CLayer), *[c_void_p] * 3, *_ROWS),
    "complete": (POINTER(CInput), *_ROWS),
    "complete_backward": (POINTER(CInput), c_void_p, c_void_p, *_ROWS),
    "classify": (c_void_p, POINTER(CLinear), *[c_void_p] * 3, *_IMAGES),  # pixels for the side
    "pool": (c_void_p, c_void_p, *_POOLED),
    "pool_backward": (c_void_p, c_void_p, *_POOLED),
}


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the arguments of the functions of `library`, so that ctypes checks them."""
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    library.fits_images.argtypes = c_int, c_int, c_int  # side, channels, stride
    library.multiply.argtypes, library.multiply.restype = (c_void_p, c_long), c_long
    return library


def c_layer(of: Layer) -> tuple[CLayer, Tensor]:
    """`of` as a C structure, and the memory in which the kernels note statistics, [4, channels]."""
    norm, channels = of.norm, of.weight.shape[0]
    noted = torch.empty(4, channels)
    norm.mean, norm.rstd = noted[:2].unbind()
    parameters = norm.weight, norm.bias, norm.weight_gradient, norm.bias_gradient
    tensors = (*parameters, norm.running_mean, norm.running_var, *noted.unbind())
    pointers = (tensor.data_ptr() for tensor in tensors)
    seen = CNorm(*pointers, norm.momentum, norm.eps, 1.0)
    return CLayer(of.weight.data_ptr(), of.weight_gradient.data_ptr(), seen), noted


def c_linear(of: Linear) -> CLinear:
    """`of` as a C structure."""
    tensors = of.weight, of.bias, of.weight_gradient, of.bias_gradient
    return CLinear(*(tensor.data_ptr() for tensor in tensors), len(of.bias))
