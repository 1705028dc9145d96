"""Run functions in several processes of one gloo group, and tell what became of each."""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

TIMEOUT = 240


def run_checks(script: Path, ranks: int, folder: Path, stage: str) -> dict[str, str]:
    """Start `script` in `ranks` processes; gives the trouble of each check, "" where there is none.

    The script calls `report`.
    """
    store = folder / f"store-{stage}"
    results = [folder / f"{stage}-{rank}.json" for rank in range(ranks)]
    processes = [
        subprocess.Popen(
            [sys.executable, script, stage, store, result, str(rank), str(ranks)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, result in enumerate(results)
    ]
    try:
        outputs = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    told = [json.loads(r.read_text()) if r.exists() else {} for r in results]
    assert all(told), outputs
    return {
        name: "\n".join(f"rank {rank}: {of[name]}" for rank, of in enumerate(told) if of[name])
        for name in told[0]
    }


def report(checks: dict[str, Sequence[Callable[..., None]]]) -> None:
    """In a started process: join the group, run the checks of the stage, write what became of them.

    A check with a parameter gets the folder that all stages share.
    """
    import torch
    import torch.distributed as dist

    stage, store, result, rank, ranks = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=int(rank),
        world_size=int(ranks),
        timeout=timedelta(seconds=30),
    )
    told = {}
    for check in checks[stage]:
        try:
            check(*[Path(store).parent] * check.__code__.co_argcount)
            told[check.__name__] = ""
        except BaseException:  # of which torch.distributed.checkpoint raises some
            told[check.__name__] = traceback.format_exc()
    Path(result).write_text(json.dumps(told))
    dist.destroy_process_group()
