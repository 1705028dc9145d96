"""Start other processes that run a function of this library."""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # not every system has both
    from multiprocessing.context import ForkServerContext, SpawnContext


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
