"""Programs that tests start in processes of their own."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path


def program(name: str) -> Path:
    """A file of this folder."""
    return Path(__file__).with_name(f"{name}.py")


def environment() -> dict[str, str]:
    """Of a process that can import what this one can, and has one thread."""
    path = os.pathsep.join(filter(None, sys.path))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def forked(command: Callable[..., int], *arguments: object, output: Path) -> BaseProcess:
    """Start a command in a process that is forked from one which has imported the command line.

    So it begins at once, and shares no state with this process.

    Args:
        command: a function of words that gives the exit code; of a module.
        output: the file for what it prints.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["support.forked"])
    process = server.Process(target=_run, args=(command, [*map(str, arguments)], output))
    process.start()
    return process


def _run(command: Callable[..., int], arguments: list[str], output: Path) -> None:
    import torch

    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    os.environ["COLUMNS"] = "80"
    sys.exit(command(*arguments))
