"""The processes of one run, as torchrun starts them: ranks, collectives, and the first process.

Without torchrun everything here works as with a single process.
"""

import gc
import importlib
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from stochastic_depth.errors import ConfigError, RunError

Value = TypeVar("Value")


@contextmanager
def torchrun_process_group() -> Iterator[None]:
    """While entered, this process belongs to the group of the processes that torchrun has started.

    Collectives on tensors of a GPU use nccl, those on tensors of a CPU use gloo.

    Raises:
        ConfigError: when there are more processes on this machine than GPUs.
        RunError: in place of the error of PyTorch when another process has died.
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
    # torchrun keeps its store over restarts, and gloo would find dead processes in it.
    store = PrefixStore(f"restart {restarts()}", store)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    try:
        with process_group(backend, store=store, rank=rank, world_size=size):
            yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo/transport" not in str(error):
            raise
        raise RunError(
            f"process {rank} of {size} waited for one that is no longer there; torchrun "
            "--max-restarts N would restart all of them, to resume from the last checkpoint"
        ) from error


@contextmanager
def process_group(backend: str, **settings: Any) -> Iterator[None]:
    """`dist.init_process_group(backend, **settings)` on entry, and the end of the group on exit.

    Its threads end with it; a thread that still runs when the interpreter ends may abort the
    process. After an error the group is left as it is, because other processes may be gone.
    """
    # Import now: at import, its functions capture the default group and would keep it alive.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group(backend, **settings)
    yield
    gc.collect()  # the threads end when nothing refers to the group
    dist.destroy_process_group()


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_primary() -> bool:
    """Whether this is rank 0, the process that writes and prints."""
    return rank() == 0


def restarts() -> int:
    """How often torchrun has restarted these processes because one of them had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def may_restart() -> bool:
    """Whether torchrun restarts these processes when one of them dies."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank."""
    if world_size() == 1:
        return flag
    return bool(all_reduce_sum(torch.tensor(int(flag))))


def broadcast_from_primary(tensors: Iterable[Tensor]) -> None:
    """Copy the values of `tensors` from the first rank to all others, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def on_primary(act: Callable[[], Value]) -> Value:
    """Call `act` on the first rank only; every rank returns its result, or raises its error.

    Results and errors are pickled between the ranks, which all run this program. In place of an
    error that cannot be pickled, the other ranks raise a RunError with its message.
    """
    if world_size() == 1:
        return act()
    value, error = None, None
    if is_primary():
        try:
            value = act()
        except Exception as raised:
            error = raised
    outcome = [value, _picklable(error)]
    dist.broadcast_object_list(outcome, 0, device=torch.device("cpu"))
    value, sent = outcome
    error = error or sent
    if error is not None:
        raise error
    return value


def _picklable(error: Exception | None) -> Exception | None:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RunError(f"{type(error).__name__} in the first process: {error}")
    return error
