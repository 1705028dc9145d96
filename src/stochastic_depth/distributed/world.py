"""The processes of one run, as torchrun starts them: rank, collectives, and the first process.

Without torchrun everything here works as with a single process.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from stochastic_depth.errors import ConfigError, RunError, StochasticDepthError

Value = TypeVar("Value")


@contextmanager
def joined() -> Iterator[None]:
    """While entered, be one of the processes that torchrun has started.

    Collectives on tensors of a GPU go by nccl, those on a CPU by gloo.

    Raises:
        ConfigError: when there are more processes on this machine than GPUs.
        RunError: in place of what PyTorch raises when another process is no longer there.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    gpus, local = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if gpus:
        if local >= gpus:
            raise ConfigError(
                f"process {local + 1} of this machine has no GPU, there are {gpus}: give torchrun "
                f"--nproc-per-node {gpus}, or hide them (CUDA_VISIBLE_DEVICES=) to use the CPU"
            )
        torch.cuda.set_device(local)
    store, rank, size = next(rendezvous("env://"))
    # torchrun keeps its store over restarts, and gloo would look there for processes that are dead.
    store = PrefixStore(f"restart {restarts()}", store)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo/transport" not in str(error):
            raise
        raise RunError(
            f"process {rank} of {size} waited for one that is no longer there; torchrun "
            "--max-restarts N would start all of them again, to resume from the last checkpoint"
        ) from error
    dist.destroy_process_group()  # not after an error, when others may not be there


def ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_primary() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def restarts() -> int:
    """How often torchrun has restarted these processes, because one of them had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def may_restart() -> bool:
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def total(value: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if ranks() > 1:
        dist.all_reduce(value)
    return value


def any_rank(flag: bool) -> bool:
    """Whether it is true on any rank."""
    if ranks() == 1:
        return flag
    return bool(total(torch.tensor(int(flag))))


def as_on_primary(tensors: Iterable[Tensor]) -> None:
    """Make `tensors` on every rank what they are on the first, in place."""
    if ranks() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def on_primary(act: Callable[[], Value]) -> Value:
    """Call `act` on the first rank only; every rank returns or raises what it did there.

    Results are pickled between the ranks, which all run this program.
    """
    if ranks() == 1:
        return act()
    outcome: list = [None, None]
    if is_primary():
        try:
            outcome[0] = act()
        except StochasticDepthError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, 0, device=torch.device("cpu"))
    value, error = outcome
    if error is not None:
        raise error
    return value
