"""Checkpoints of sharded models, each rank writing its part, for any number of ranks to load."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from stochastic_depth.errors import CheckpointError
from stochastic_depth.surgery.apply import handle_of


def save_sharded(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write weights, optimizer and gates to `folder`, by `torch.distributed.checkpoint`.

    Raises:
        CheckpointError: when it cannot be written.
    """
    try:
        save(_state(model, optimizer), checkpoint_id=folder)
    except CheckpointException as error:
        raise CheckpointError(f"{folder} could not be written: {_first(error)}") from error


def load_sharded(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Go on where `save_sharded` was called, by as many ranks or others, sharded or not.

    Under `skipped="freeze"` the optimizer knows nothing yet of a block that was never open, and
    will not when this returns.

    `torch.distributed.checkpoint` unpickles what is in `folder`: load what you have written.

    Raises:
        CheckpointError: when it cannot be read, or is of another network.
        StateError: when it was written with other survival probabilities, gates or scaling.
    """
    state = _state(model, optimizer)
    try:
        known = FileSystemReader(folder).read_metadata().state_dict_metadata
        lost = sorted(name for name in state["model"] if f"model.{name}" not in known)
        if lost:
            raise CheckpointError(
                f"{folder} has no {', '.join(lost[:3])}: it is of another network"
            )
        load(state, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=True))
    except (CheckpointException, OSError) as error:
        raise CheckpointError(f"{folder} cannot be read: {_first(error)}") from error
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    for name, parameter in model.named_parameters():
        if not any(entry.startswith(f"optimizer.state.{name}.") for entry in known):
            optimizer.state.pop(parameter, None)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, of_optimizer = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": of_optimizer, "depth": handle_of(model)}


def _first(error: BaseException) -> str:
    """What went wrong on the first of the ranks on which something did."""
    failures = getattr(error, "failures", {})
    return str(next(iter(failures.values()))[0]) if failures else str(error)
