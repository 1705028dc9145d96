"""Sharded data parallelism (FSDP2) in which closed blocks communicate nothing; its checkpoints."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import fully_shard

from stochastic_depth.distributed.rank_gates import GateConsistency
from stochastic_depth.distributed.reduction import used_outside
from stochastic_depth.errors import CheckpointError, GateError
from stochastic_depth.surgery.applied import handle_of, owner_of


def modules_to_shard(model: nn.Module) -> list[list[nn.Module]]:
    """For each residual block of `model`, the outermost modules that run only in its branch.

    They hold all parameters of the branches, except those of the block itself and of modules that
    also run under a closed gate. A module that several blocks use is listed for one of them. Blocks
    inside the branch of another block come first. The model may have been wrapped since `sd.apply`.

    Raises:
        ApplyError: when `sd.apply` was not called on `model`.
    """
    taken: set[nn.Module] = set()
    groups = []
    blocks = handle_of(model).blocks
    outside = used_outside(model, owner_of(model), blocks)
    for block in sorted(blocks, key=lambda block: len(block.parameters)):
        always = {block.module, *block.gate_readers}
        owned = [each.owner._modules.get(each.name) for each in block.owned]
        branch = {
            m for each in owned if each is not None for m in _outermost(each, always, outside)
        }
        branch -= taken
        group = [module for module in model.modules() if module in branch]
        taken |= {inner for module in group for inner in module.modules()}
        if group:
            groups.append(group)
    return groups


def shard_branches(model: nn.Module, **options: Any) -> None:
    """Call `fully_shard` on the branch of every residual block, in place.

    A closed block then needs no all-gather in the forward and backward pass, and no reduce-scatter.
    The rest of the model is left for `fully_shard(model, **options)`, which must be called
    afterwards. There is a warning when no module runs only in a branch.

    `fully_shard` on whole blocks works too, but saves only the reduce-scatter, because a block is
    gathered when it is called, before its gate is read.

    Args:
        model: a model that `sd.apply` was called on.
        options: options of `fully_shard`: mesh, mp_policy, reshard_after_forward, ...

    Raises:
        ApplyError: when `sd.apply` was not called on `model`.
        GateError: when each rank draws different gates, or subsets that may be empty; or in a
            forward pass, on every rank, when gates differ between ranks. On a GPU this is checked
            in every hundredth pass.
    """
    handle = handle_of(model)
    if handle.gate == "subset" and not handle.settings.balance:
        raise GateError(
            'gate="subset" closes a block on a rank where no sample is drawn for it, and that rank '
            "would not take part in gathering its parameters: give sd.apply balance=True, or use "
            "fully_shard on whole blocks, and mini-batches of one size on all ranks"
        )
    if handle.rank is not None:
        raise GateError(
            "a sharded model needs the same gates on every rank, because all of them gather the "
            "parameters of an open block: leave out sd.distributed.gates_by_rank"
        )
    groups = modules_to_shard(model)
    if not groups:
        warnings.warn(
            f"no module of {type(model).__name__} runs only in the branch of a block, so nothing "
            "is sharded, and fully_shard(model) will gather closed blocks too: make the layers of "
            "each branch children of their block, or use DistributedDataParallel and skip_closed",
            stacklevel=2,
        )
    for group in groups:
        fully_shard(group if len(group) > 1 else group[0], **options)
    consistency = GateConsistency([handle])

    def check_gates(model: nn.Module, args: tuple) -> None:
        if model.training:
            consistency.check(next(model.parameters()).device)

    model.register_forward_pre_hook(check_gates)


def _outermost(
    module: nn.Module, always: set[nn.Module], outside: set[Tensor]
) -> Iterator[nn.Module]:
    """The outermost modules with parameters, but none of `outside`, that contain none of `always`.

    They are `module` itself, or inside of it. A container without a forward method, such as a
    `ModuleList`, is none of them: FSDP gathers parameters when a module is called.
    """
    parameters = set(module.parameters())
    is_called = type(module).forward is not nn.Module.forward
    belongs = parameters.isdisjoint(outside) and always.isdisjoint(module.modules())
    if parameters and is_called and belongs:
        yield module
    else:
        for child in module.children():
            yield from _outermost(child, always, outside)


def save_sharded(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write weights, optimizer and gates to `folder`, by `torch.distributed.checkpoint`.

    Raises:
        CheckpointError: when it cannot be written.
    """
    try:
        save(_state(model, optimizer), checkpoint_id=folder)
    except CheckpointException as error:
        raise CheckpointError(f"{folder} could not be written: {_first_failure(error)}") from error


def load_sharded(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore what `save_sharded` has written, on any number of ranks, sharded or not.

    Under `skipped="freeze"` the optimizer has no state for a block that was never open, neither
    before nor after loading.

    `torch.distributed.checkpoint` unpickles the contents of `folder`: load only what you have
    written.

    Raises:
        CheckpointError: when it cannot be read, or belongs to a different network.
        StateError: when it was written with other survival probabilities, gates or scaling.
    """
    state = _state(model, optimizer)
    try:
        known = FileSystemReader(folder).read_metadata().state_dict_metadata
        missing = sorted(name for name in state["model"] if f"model.{name}" not in known)
        if missing:
            raise CheckpointError(
                f"{folder} has no {', '.join(missing[:3])}: it belongs to a different network"
            )
        load(state, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=True))
    except (CheckpointException, OSError) as error:
        raise CheckpointError(f"{folder} cannot be read: {_first_failure(error)}") from error
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    for name, parameter in model.named_parameters():
        if not any(entry.startswith(f"optimizer.state.{name}.") for entry in known):
            optimizer.state.pop(parameter, None)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state, "handle": handle_of(model)}


def _first_failure(error: BaseException) -> str:
    """The text of the first error on any rank."""
    failures = getattr(error, "failures", {})
    return str(next(iter(failures.values()))[0]) if failures else str(error)
