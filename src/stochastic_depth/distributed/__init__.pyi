from stochastic_depth.distributed.rank_gates import gates_by_rank as gates_by_rank
from stochastic_depth.distributed.reduction import skip_closed as skip_closed
from stochastic_depth.distributed.sharding import load_sharded as load_sharded
from stochastic_depth.distributed.sharding import modules_to_shard as modules_to_shard
from stochastic_depth.distributed.sharding import save_sharded as save_sharded
from stochastic_depth.distributed.sharding import shard_branches as shard_branches
from stochastic_depth.distributed.sync_batchnorm import CpuSyncBatchNorm as CpuSyncBatchNorm
from stochastic_depth.distributed.sync_batchnorm import (
    synchronise_batchnorm as synchronise_batchnorm,
)
