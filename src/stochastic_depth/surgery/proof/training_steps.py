"""Prove in training mode what `check` proves in evaluation, and that a training step works."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.block import Block
from stochastic_depth.choices import Scale
from stochastic_depth.errors import (
    AdditionNotReachedError,
    BypassedAdditionWarning,
    StochasticDepthError,
    UnsupportedBlockError,
)
from stochastic_depth.gates import CLOSED, OPEN, GateKind
from stochastic_depth.hooks import refuse_cache
from stochastic_depth.surgery.blocks import FoundBlock, unsupported
from stochastic_depth.surgery.example import preserve_state
from stochastic_depth.surgery.install import ungated
from stochastic_depth.surgery.proof.call_counts import (
    CallCounts,
    counted_calls,
    in_training,
    refuse_running,
)
from stochastic_depth.surgery.proof.evaluation import smallest
from stochastic_depth.surgery.proof.training_outputs import compare_training
from stochastic_depth.tensors import tensors_in

TRAINING_PASSES = 4
"""How many passes in training mode, with every gate open, must each reach every block."""


def check_training(
    model: nn.Module,
    run: Callable[..., Any],
    found: Sequence[FoundBlock],
    blocks: Sequence[Block],
    batch: int | None = None,
    kind: GateKind = "batch",
    scale: Scale = "inference",
) -> dict[str, Any]:
    """Check that in training mode open blocks are reached, and closed blocks run nothing.

    Args:
        batch: the number of samples in the example, for gates of single samples.

    Returns:
        The attributes to which a branch assigns a tensor with a graph, by name of module and
        attribute, with their values from before. They have to be reset before each pass.

    Raises:
        UnsupportedBlockError: when the model itself drops a block, when training mode runs it on a
            different path, or when its backward pass fails, for example because a tensor was
            changed in place.
    """
    with preserve_state(model), torch.enable_grad(), warnings.catch_warnings():
        # The checks below cover a different path in training mode.
        warnings.simplefilter("ignore", BypassedAdditionWarning)
        model.train()
        before = {name: dict(vars(module)) for name, module in model.named_modules()}
        try:
            with in_training(blocks, [OPEN] * len(blocks)):
                passes = [_counted(model, run, seed) for seed in range(TRAINING_PASSES)]
            opened = {name: dict(vars(module)) for name, module in model.named_modules()}
            names = {module: name for name, module in model.named_modules()}
            for block in found:
                if why := _model_skips(block, passes, names):
                    raise unsupported(block.name, block.module, why)
            try:
                for _ in range(2):  # the second one may use what the first has left
                    with in_training(blocks, [CLOSED] * len(blocks)):
                        called = _counted(model, run, 0)
                    refuse_running(found, passes[0], called, "in training mode ")
                resets = _attributes_set(model, found, before, opened)
                compare_training(model, run, found, blocks, batch, kind, scale)
                for first in (1, 0):  # every other block, so that each is closed in one step
                    closed = list(range(first, len(blocks), 2))
                    if why := _why_not_trained(run, blocks, closed):
                        if original := _why_original_fails(model, run):
                            return _not_proved(original)
                        wrong = functools.partial(_why_not_trained, run, blocks)
                        raise _fails_closed(found, *smallest(closed, why, wrong))
            except AdditionNotReachedError as error:
                raise _unreached(error, found) from error
        except StochasticDepthError:
            raise
        except Exception as error:
            if original := _why_original_fails(model, run):
                return _not_proved(original)
            wrong = functools.partial(_why_not_trained, run, blocks)
            everything = list(range(len(blocks)))
            why = wrong(everything) or f"{type(error).__name__}: {error}"
            raise _fails_closed(found, *smallest(everything, why, wrong)) from error
    return resets


def _fails_closed(
    found: Sequence[FoundBlock], closed: Sequence[int], why: str
) -> UnsupportedBlockError:
    """The error for blocks with which a training step fails while they are closed."""
    block = found[closed[0] if closed else 0]
    names = [found[n].name for n in closed[1:]]
    return unsupported(
        block.name, block.module, f"with it closed a training step fails: {why}", names
    )


def _not_proved(why: str) -> dict[str, Any]:
    """Warn that training mode is not proved, because the original cannot train on the example."""
    warnings.warn(
        f"training mode is not proved: the model itself cannot take a training step on the example "
        f"({why}): give an example as in training",
        stacklevel=2,
    )
    return {}


def _unreached(
    error: AdditionNotReachedError, found: Sequence[FoundBlock]
) -> UnsupportedBlockError:
    """The error for a block whose addition does not run in training mode."""
    why = "in training mode it does not make the addition that it makes in evaluation"
    named = next((block for block in found if block.name == error.block), None)
    if named is None:
        return UnsupportedBlockError(f"{why}: {error}")
    return unsupported(named.name, named.module, why)


def _why_original_fails(model: nn.Module, run: Callable[..., Any]) -> str:
    """Why the original model cannot take a training step on the example; empty if it can."""
    try:
        with ungated(model):
            train_once(run)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _why_not_trained(run: Callable[..., Any], blocks: Sequence[Block], closed: list[int]) -> str:
    """Why a training step with the blocks `closed` fails; empty if it does not."""
    gates = [CLOSED if n in closed else OPEN for n in range(len(blocks))]
    try:
        with in_training(blocks, gates):
            train_once(run)
    except StochasticDepthError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _counted(model: nn.Module, run: Callable[..., Any], seed: int) -> CallCounts:
    with counted_calls(model) as calls:
        refuse_cache(run(seed))
    return calls


def _model_skips(
    block: FoundBlock, passes: Sequence[CallCounts], names: Mapping[nn.Module, str]
) -> str:
    """Why a block does not run in some of `passes`, in which every gate is open; empty if it does.

    Args:
        names: the names of all modules. If a branch calls no module, the module that adds must run.
    """
    for unit in block.units:
        runs = unit.modules or {names[module] for module, _ in unit.edits if module in names}
        reached = [any(calls.number[name] for name in runs) for calls in passes]
        if runs and not all(reached):
            often = f"{len(reached) - sum(reached)} of {len(reached)}"
            return (
                f"in {often} passes in training mode the model itself leaves it out: set the "
                "model's own layer drop or drop path to 0, because sd.apply takes its place"
            )
    return ""


def _attributes_set(
    model: nn.Module,
    found: Sequence[FoundBlock],
    before: Mapping[str, Mapping[str, Any]],
    opened: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Attributes in which a branch keeps a tensor with a graph, with their old values.

    They are attributes of the modules of a branch, and those of other modules that closed blocks
    leave as they are.

    Args:
        before: the attributes of each module before any pass.
        opened: after passes with all gates open. The last pass had all gates closed.

    Raises:
        UnsupportedBlockError: when such an attribute had no value before the pass.
    """
    kept: dict[str, Any] = {}
    block_of = {name: block for block in found for name in block.modules}
    for name, attributes in opened.items():
        module = model.get_submodule(name)
        for attribute, value in attributes.items():
            has_graph = isinstance(value, Tensor) and value.grad_fn is not None
            if (
                not has_graph
                or isinstance(value, nn.Parameter)
                or _is_made_by_hook(module, attribute)
            ):
                continue
            if name not in block_of and vars(module).get(attribute) is not value:
                continue
            old = before[name].get(attribute)
            if attribute not in before[name] or (
                isinstance(old, Tensor) and old.grad_fn is not None
            ):
                around = (block for block in found if name == block.name)
                block = block_of.get(name) or next(around, found[0])
                raise unsupported(
                    block.name,
                    block.module,
                    f"its branch sets {attribute!r} of {name!r} to a tensor with a graph, which a "
                    "closed block would leave there from an earlier step: in __init__, set the "
                    "attribute to its value for a closed block, such as torch.zeros(())",
                )
            kept[f"{name}.{attribute}"] = old
    return kept


def _is_made_by_hook(module: nn.Module, attribute: str) -> bool:
    """Whether weight_norm, spectral_norm or pruning computes the attribute before each call."""
    return any(f"{attribute}_{part}" in module._parameters for part in ("v", "orig"))


def train_once(run: Callable[..., Any]) -> None:
    """A forward pass, and the backward pass of the sum of all its outputs."""
    output = run()
    refuse_cache(output)
    differentiable = [out for out in tensors_in(output) if out.requires_grad]
    if differentiable:
        torch.stack([out.float().sum() for out in differentiable]).sum().backward()
