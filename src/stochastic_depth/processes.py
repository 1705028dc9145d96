"""Other processes that run a function of ours."""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # not everywhere are there both
    from multiprocessing.context import ForkServerContext, SpawnContext


def fresh_processes(module: str) -> ForkServerContext | SpawnContext:
    """Processes that begin with nothing of this one.

    Where the system can, they are forked from one that has imported `module` and done nothing
    else: importing PyTorch takes seconds, which only the first one waits for. Elsewhere each
    imports it itself.

    Args:
        module: that of the function which they run, by its full name.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context
