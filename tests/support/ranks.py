"""Run functions in several processes of one gloo group, and report which of them failed."""

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from support.processes import environment, program

TIMEOUT = 800
"""Seconds for all stages, on a machine that does much besides."""
RANKS = {"one": 1, "two": 2, "four": 4}

Checks = Mapping[str, Sequence[Callable[..., None]]]


def run_checks(loop: str, folder: Path) -> dict[tuple[str, str], str]:
    """The failure of each (stage, check) of a program that calls `report`, "" for none."""
    process = subprocess.Popen(
        [sys.executable, program(loop), folder],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    finally:
        with suppress(ProcessLookupError):  # as it should be: all ranks have ended too
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    shown: dict[tuple[str, str], str] = {}
    for path in sorted(folder.glob("*-rank-*.json")):
        stage, _, rank = path.stem.partition("-rank-")
        for check, failure in json.loads(path.read_text()).items():
            before = shown.setdefault((stage, check), "")
            shown[stage, check] = before + (f"rank {rank}: {failure}\n" if failure else "")
    assert process.returncode == 0, output
    return shown


def report(checks: Checks) -> None:
    """In a started process: run the checks of each stage on its ranks, and write their failures.

    The ranks are forked: all has been imported by then, and they begin at the same time. A check
    with a parameter gets the folder that all stages share.
    """
    folder = Path(sys.argv[1])
    for stage in checks:
        forked = [_fork(checks, stage, rank, folder) for rank in range(RANKS[stage])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in forked]
        assert codes == [0] * RANKS[stage], (stage, codes)


def _fork(checks: Checks, stage: str, rank: int, folder: Path) -> int:
    """The process id of a new rank."""
    pid = os.fork()
    if pid == 0:
        try:
            _run(checks, stage, rank, folder)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    return pid


def _run(checks: Checks, stage: str, rank: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / f'store-{stage}'}",
        rank=rank,
        world_size=RANKS[stage],
        timeout=timedelta(seconds=300),
    )
    shown = {}
    for check in checks[stage]:
        try:
            check(*[folder] * check.__code__.co_argcount)
            shown[check.__name__] = ""
        except BaseException:  # of which torch.distributed.checkpoint raises some
            shown[check.__name__] = traceback.format_exc()
    (folder / f"{stage}-rank-{rank}.json").write_text(json.dumps(shown))
    dist.destroy_process_group()
