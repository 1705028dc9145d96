"""What differs where a run is resumed from where it began: what is recorded, and what is said."""

from collections.abc import Callable
from dataclasses import replace

import torch

from stochastic_depth.distributed.world import on_primary, world_size
from stochastic_depth.train.run_folder import Run, open_run
from stochastic_depth.train.runtime import machine, timing_conditions


def conditions_elsewhere(run: Run) -> dict[str, str] | None:
    """The `timing_conditions` here; None if they are those under which the run began."""
    began = open_run(run.path)
    runtime = replace(run.runtime, threads=torch.get_num_threads())
    now = timing_conditions(runtime, machine(runtime))
    before = {"processes": "1", **timing_conditions(began.runtime, began.machine)}
    return None if now == before else now


def say_what_differs(run: Run, say: Callable[[str], None]) -> None:
    """Say which differences to where the run began keep it from ending bit for bit the same."""
    began, now = on_primary(lambda: open_run(run.path)).runtime, run.runtime
    threads = torch.get_num_threads()
    if not now.on_gpu and threads != began.threads:
        say(
            f"begun with {began.threads} threads, resumed with {threads}: sums are "
            "rounded differently (set OMP_NUM_THREADS for bitwise identical results)"
        )
    processes = run.machine.get("processes", world_size())
    if processes != world_size():
        say(
            f"the number of processes was {processes}, and is {world_size()}: results depend on it "
            "through batch normalisation, and times of this run are of both"
        )
    if (began.device, began.engine) != (now.device, now.engine):
        say(
            f"begun on {began.device} by {began.engine}, resumed on {now.device} by "
            f"{now.engine}: sums are rounded differently, and times of this run are of both"
        )
