"""Gates on several ranks: checked to be the same on each rank, or drawn differently on each."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from stochastic_depth.errors import GateError
from stochastic_depth.handle import Handle
from stochastic_depth.randomness import digest
from stochastic_depth.surgery.applied import handle_of
from stochastic_depth.torch_private import is_sharded

_CALLS_PER_CHECK = 100
"""After how many calls a check is done on a GPU, because it synchronises with the GPU."""


class GateConsistency:
    """Checks from time to time that all ranks have the same gates.

    Every rank must call `check` at the same points of its program.
    """

    def __init__(self, handles: Sequence[Handle], group: dist.ProcessGroup | None = None) -> None:
        self._handles, self._group = handles, group
        self._calls = 0

    def check(self, device: torch.device) -> None:
        """Check every time on a CPU; on a GPU the first time and every hundredth.

        Raises:
            GateError: as `require_same_gates`.
        """
        if device.type == "cpu" or self._calls % _CALLS_PER_CHECK == 0:
            require_same_gates(self._handles, self._group)
        self._calls += 1


def require_same_gates(handles: Sequence[Handle], group: dist.ProcessGroup | None = None) -> None:
    """Refuse gates that differ between ranks. This is a collective.

    Raises:
        GateError: on every rank; it names the difference.
    """
    mine = [handle.state_dict() for handle in handles if handle.rank is None]
    signature = int.from_bytes(digest(7, repr(mine)), "little")
    extremes = torch.tensor([signature, -signature], device=_device(group))
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    high, low = extremes.tolist()
    if high == -low:
        return
    states: list[list[dict]] = [[]] * dist.get_world_size(group)
    dist.all_gather_object(states, mine, group=group)
    raise GateError(f"ranks have different gates: {_difference(states)}")


def _difference(states: Sequence[Sequence[dict]]) -> str:
    for rank, state in enumerate(states):
        for one, other in zip(states[0], state, strict=False):
            for name, value in one.items():
                if other[name] != value:
                    remedy = {
                        "seed": "give sd.apply the same seed everywhere, or draw different gates "
                        "on each rank by sd.distributed.gates_by_rank(model)",
                        "step": "call the model in training mode on every rank or on none, and "
                        "load the same state",
                    }.get(name, "give sd.apply the same settings everywhere")
                    return f"{name} is {value} on rank 0 and {other[name]} on rank {rank}; {remedy}"
    return "only some of them draw gates by rank; call sd.distributed.gates_by_rank on all ranks"


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """The device on which collectives of `group` need their tensors."""
    gpu_only = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if gpu_only else torch.device("cpu")


def gates_by_rank(model: nn.Module, rank: int | None = None) -> None:
    """Draw different gates on each rank: more patterns in a step, but less is saved.

    The gates are a function of (seed, rank, step), and `handle.state_dict()` is the same on every
    rank. A step takes as long as on the rank with the most open blocks. A gradient is sent when its
    block is open on any rank: with 8 ranks at p = 0.5, nearly always.

    Args:
        model: a model that `sd.apply` was called on, before or after it is wrapped.
        rank: the rank of this process; its rank in the default group when not given.

    Raises:
        GateError: when `model` is sharded. A rank on which a block is closed would not take part in
            gathering its parameters, and the other ranks would wait for it.
    """
    handle = handle_of(model)
    if is_sharded(model):
        raise GateError(
            "a sharded model needs the same gates on every rank, because all of them gather the "
            "parameters of an open block: use DistributedDataParallel for gates by rank"
        )
    handle.rank = dist.get_rank() if rank is None else rank
