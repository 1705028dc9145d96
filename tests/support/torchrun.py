"""torchrun's own agent over processes that are forked, not started: a restart costs little.

Arguments: the number of processes, how often they may be restarted, then those of the command.
"""

import sys

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import support.operators  # noqa: F401
from stochastic_depth.cli import main


def work(*arguments: str) -> None:
    sys.exit(main([*arguments]))


if __name__ == "__main__":
    ranks, restarts, *arguments = sys.argv[1:]
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=int(ranks),
        max_restarts=int(restarts),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
        monitor_interval=0.02,
    )
    elastic_launch(config, work)(*arguments)
