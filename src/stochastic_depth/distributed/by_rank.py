"""Gates that each rank draws for itself."""

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from stochastic_depth.errors import GateError
from stochastic_depth.surgery.apply import handle_of


def gates_by_rank(model: nn.Module, rank: int | None = None) -> None:
    """Draw gates of its own for each rank: more of them in a step, at the price of the saving.

    They are a function of (seed, rank, step), and `handle.state_dict()` is the same on every rank.
    A step takes as long as that of the rank with the most open blocks, and a gradient is sent when
    its block is open on any rank: with 8 ranks at p = 0.5 all but always.

    Args:
        model: one that `sd.apply` was given, before or after it is wrapped.
        rank: that of this process, among those of the default group when not given.

    Raises:
        GateError: when `model` is sharded: a rank on which a block is closed would not take part in
            gathering its parameters, and the others wait for it.
    """
    handle = handle_of(model)
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise GateError(
            "a sharded model needs the same gates on every rank, because all of them gather the "
            "parameters of an open block: use DistributedDataParallel for gates by rank"
        )
    handle.rank = dist.get_rank() if rank is None else rank
