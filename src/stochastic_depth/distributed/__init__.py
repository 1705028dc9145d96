"""Many processes, one model: what a closed block need not send.

Plain `DistributedDataParallel` and `fully_shard` work with an applied model as they are; with these
a closed block costs no communication either.
"""

from stochastic_depth.distributed.rank_gates import gates_by_rank
from stochastic_depth.distributed.reduction import skip_closed
from stochastic_depth.distributed.sharding import (
    branch_modules,
    load_sharded,
    save_sharded,
    shard_branches,
)
from stochastic_depth.distributed.sync_batchnorm import CpuSyncBatchNorm, synchronise_batchnorm

__all__ = [
    "CpuSyncBatchNorm",
    "branch_modules",
    "gates_by_rank",
    "load_sharded",
    "save_sharded",
    "shard_branches",
    "skip_closed",
    "synchronise_batchnorm",
]
