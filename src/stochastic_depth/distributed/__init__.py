"""Many processes, one model: what a closed block need not send.

Plain `DistributedDataParallel` and `fully_shard` work with an applied model as they are; with these
a closed block costs no communication either. Names load when they are touched: sharding takes
seconds to import, and a run of one process needs none of it.
"""

from typing import TYPE_CHECKING

from stochastic_depth.lazy import lazily as _lazily

if TYPE_CHECKING:
    from stochastic_depth.distributed.rank_gates import gates_by_rank
    from stochastic_depth.distributed.reduction import skip_closed
    from stochastic_depth.distributed.sharding import (
        branch_modules,
        load_sharded,
        save_sharded,
        shard_branches,
    )
    from stochastic_depth.distributed.sync_batchnorm import (
        CpuSyncBatchNorm,
        synchronise_batchnorm,
    )

_HOMES = {
    "rank_gates": ("gates_by_rank",),
    "reduction": ("skip_closed",),
    "sharding": ("branch_modules", "load_sharded", "save_sharded", "shard_branches"),
    "sync_batchnorm": ("CpuSyncBatchNorm", "synchronise_batchnorm"),
}

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

__getattr__, __dir__ = _lazily(__name__, _HOMES)
