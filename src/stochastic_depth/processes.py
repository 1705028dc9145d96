"""Start other processes; and the cores and the memory that this one uses."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # not every system has all
    from multiprocessing.context import ForkContext, ForkServerContext, SpawnContext


def fresh_processes(module: str) -> ForkServerContext | SpawnContext:
    """A context for processes that inherit nothing of this one.

    Where the system allows it, they are forked from a server process that has imported `module` and
    done nothing else. Importing PyTorch takes seconds, and only the first process waits for it. On
    other systems each process imports the module itself.

    Args:
        module: the full name of the module of the function that the processes run.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


def forked_processes() -> ForkContext | SpawnContext:
    """A context for processes that have what this one has imported, where forking is safe.

    The default of Python is not that: in a process of `fresh_processes`, and everywhere from
    Python 3.14 on, it is a fresh interpreter, which imports PyTorch again, for seconds. On systems
    other than Linux a forked process can crash, and each one imports what it needs.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    return multiprocessing.get_context("fork")


@contextmanager
def interrupts_blocked() -> Iterator[None]:
    """While entered, processes that are started inherit that Ctrl-C is blocked, and never get it.

    Ctrl-C reaches a whole group of processes. If it were ignored here while others start, this
    process would lose it; blocked, it waits until the end, or reaches another thread.
    """
    resource_tracker.ensure_running()  # starting it later would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def resident() -> int:
    """The bytes of this process in memory; their peak, if the system does not report them."""
    return _status("VmRSS") or peak_resident()


def peak_resident() -> int:
    """The largest number of bytes of this process that were in memory at one time."""
    # On Linux, getrusage begins with the peak of the process that started this one.
    if peak := _status("VmHWM"):
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


_STATUS = Path("/proc/self/status")


def _status(name: str) -> int:
    """A field of Linux's description of this process, in bytes; 0 if there is none."""
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), 0)
