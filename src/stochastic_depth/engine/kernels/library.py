"""The native kernels, compiled on first use, where processor and compiler are there."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from stochastic_depth.engine.kernels.structures import declare
from stochastic_depth.engine.private_cache import only_we_write, private_cache
from stochastic_depth.errors import EngineError

SOURCE = Path(__file__).with_name("avx512") / "kernels.cpp"
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c++17")


def missing() -> str | None:
    """Why native kernels cannot be had here; None where they can."""
    processor = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if not processor.get("avx512_bf16"):
        return "the processor has no AVX512-BF16"
    if _compiler() is None:
        return "no C++ compiler was found (g++, or the one that CXX names)"
    return None


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels, from the cache folder if they were compiled before.

    Raises:
        EngineError: where they cannot be compiled, saying why.
    """
    reason = missing()
    if reason is not None:
        raise EngineError(f"native kernels: {reason}; use --engine eager")
    compiler = _compiler()
    assert compiler is not None
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    made_of = [
        *(path.read_text() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))),
        version,
        *FLAGS,
        repr(torch.cpu.get_capabilities()),
    ]
    name = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    cache = private_cache()
    path = cache / f"native-{name}.so"
    try:
        if not (path.is_file() and only_we_write(path)):
            _compile(compiler, path)
        return declare(ctypes.CDLL(str(path)))
    except OSError as error:
        raise EngineError(
            f"native kernels: {error}; remove {path}, or use --engine eager"
        ) from error


def _compile(compiler: str, path: Path) -> None:
    """Make the library at `path`, which is whole or not there."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler, *FLAGS, "-o", str(made), str(SOURCE)]
        outcome = subprocess.run(command, capture_output=True, text=True)
        if outcome.returncode:
            said = outcome.stderr.strip() or f"it ended with {outcome.returncode}"
            raise EngineError(
                f"native kernels: {compiler} failed: {said.splitlines()[0]}; use --engine eager"
            )
        made.chmod(0o700)
        with made.open("rb") as file:
            os.fsync(file.fileno())
        made.replace(path)
