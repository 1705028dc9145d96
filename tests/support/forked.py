"""Commands of processes that are forked, and what they import."""

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import stochastic_depth.cli.train
import stochastic_depth.distributed
import stochastic_depth.lab.sweep.workers
import stochastic_depth.train.display
import stochastic_depth.train.fit
import stochastic_depth.train.open  # noqa: F401
from stochastic_depth.cli import main


def command_line(*arguments: str) -> int:
    """`stochastic-depth`."""
    return main([*arguments])


def torchrun(restarts: str, *arguments: str) -> int:
    """`torchrun --nproc-per-node 2` of it, by torchrun's own agent; a restart costs little."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        max_restarts=int(restarts),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
        monitor_interval=0.02,
    )
    elastic_launch(config, _worker)(*arguments)
    return 0


def _worker(*arguments: str) -> None:
    raise SystemExit(main([*arguments]))
