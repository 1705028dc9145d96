"""Prove that a model does in training mode what it was seen to do in evaluation."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.errors import StochasticDepthError, UnsupportedBlockError
from stochastic_depth.handle import Block
from stochastic_depth.hooks import refuse_cache
from stochastic_depth.surgery.blocks import Found, unsupported
from stochastic_depth.surgery.calls import (
    CLOSED,
    OPEN,
    CallCounts,
    counted_calls,
    in_training,
    still_called,
)
from stochastic_depth.surgery.gating import ungated
from stochastic_depth.surgery.preserve import preserve_state
from stochastic_depth.tensors import tensors_in

TRAINING_PASSES = 4
"""Passes in training mode with every gate open, in which each block must be reached."""


def check_training(
    model: nn.Module,
    run: Callable[..., Any],
    found: Sequence[Found],
    blocks: Sequence[Block],
) -> dict[str, Any]:
    """Passes in training mode: each block is reached when open, and runs nothing when closed.

    Returns:
        What modules of branches held before a pass that leaves a part of its graph on them, by
        name of module and attribute: a closed branch must leave that.

    Raises:
        UnsupportedBlockError: when a block is left out by the model itself, runs on another path
            in training mode, or backward fails, say because something works in place.
    """
    with preserve_state(model), torch.enable_grad():
        model.train()
        before = {name: dict(vars(module)) for name, module in model.named_modules()}
        try:
            with in_training(blocks, [OPEN] * len(blocks)):
                passes = [_counted(model, run, seed) for seed in range(TRAINING_PASSES)]
            left = _left_behind(model, found, before)
            for block in found:
                if why := _left_out(block, passes):
                    raise unsupported(block.name, block.module, why)
            with in_training(blocks, [CLOSED] * len(blocks)):
                called = _counted(model, run, 0)
            for block in found:
                if why := still_called(block, passes[0], called):
                    if block.mechanism != "Residual":
                        why += "; or it takes another path in training mode than in evaluation"
                    raise unsupported(block.name, block.module, why)
            every_other = [CLOSED if n % 2 else OPEN for n in range(len(blocks))]
            with in_training(blocks, every_other):
                train_once(run)
        except StochasticDepthError:
            raise
        except Exception as error:
            if not _original_trains(model, run):
                return {}  # the example is not one to train on
            raise UnsupportedBlockError(
                f"a training step of {type(model).__name__} with every other block closed fails: "
                f"{error}; exclude= leaves blocks as they are"
            ) from error
    return left


def _original_trains(model: nn.Module, run: Callable[..., Any]) -> bool:
    try:
        with ungated(model):
            train_once(run)
    except Exception:
        return False
    return True


def _counted(model: nn.Module, run: Callable[..., Any], seed: int) -> CallCounts:
    with counted_calls(model) as calls:
        refuse_cache(run(seed))
    return calls


def _left_out(block: Found, passes: Sequence[CallCounts]) -> str:
    """Why a block is not reached in each of some passes with every gate open."""
    for unit in block.units:
        reached = [any(calls.number[name] for name in unit.modules) for calls in passes]
        if unit.modules and not all(reached):
            often = f"{len(reached) - sum(reached)} of {len(reached)}"
            return (
                f"in {often} passes in training mode the model leaves it out by itself: set its "
                "own layer drop or drop path to 0, whose job is taken over"
            )
    return ""


def _left_behind(
    model: nn.Module, found: Sequence[Found], before: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Attributes of modules of branches that hold a part of a graph, and what was there before."""
    left: dict[str, Any] = {}
    names = {name: block for block in found for name in block.modules}
    for name, block in names.items():
        for attribute, value in vars(model.get_submodule(name)).items():
            is_left = isinstance(value, Tensor) and value.grad_fn is not None
            if not is_left or isinstance(value, nn.Parameter):
                continue
            old = before[name].get(attribute)
            if attribute not in before[name] or (
                isinstance(old, Tensor) and old.grad_fn is not None
            ):
                raise unsupported(
                    block.name,
                    block.module,
                    f"its branch leaves {attribute!r} on {name!r}, a part of the graph, which "
                    "would be of an earlier step while the block is closed: give it a first value "
                    f"in __init__ (torch.zeros(()), say) that holds then",
                )
            left[f"{name}.{attribute}"] = old
    return left


def train_once(run: Callable[..., Any]) -> None:
    """A forward pass, and the backward pass of the sum of all that it gives."""
    output = run()
    refuse_cache(output)
    differentiable = [out for out in tensors_in(output) if out.requires_grad]
    if differentiable:
        torch.stack([out.float().sum() for out in differentiable]).sum().backward()
