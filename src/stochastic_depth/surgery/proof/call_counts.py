"""Count the calls of modules, to see that a closed block calls no module of its branch."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stochastic_depth.block import Block, force
from stochastic_depth.errors import AdditionNotReachedError
from stochastic_depth.gates import CLOSED, OPEN
from stochastic_depth.surgery.blocks import FoundBlock, unsupported
from stochastic_depth.surgery.deferred.placeholder import Reason, why_computed
from stochastic_depth.surgery.droppath import ELSEWHERE, drop_paths_of
from stochastic_depth.surgery.edits import BRANCH_NOT_SEEN
from stochastic_depth.surgery.install import ungated
from stochastic_depth.surgery.model_state import preserve_state
from stochastic_depth.tensors import tensors_in


@dataclass(frozen=True)
class CallCounts:
    """The calls of each module during some forward passes, by name of the module."""

    number: Counter[str]
    given: Counter[str]
    """How many elements the tensors among its arguments had, summed over all calls."""
    why: dict[str, Reason | None]
    """Why a deferred call was made; None for calls that were not deferred."""


def still_running(
    model: nn.Module, run: Callable[..., Any], found: Sequence[FoundBlock], blocks: Sequence[Block]
) -> list[str]:
    """For each block, the reason why its branch runs while it is closed; empty if it does not.

    Only calls of modules are compared, no values, so this works on the meta device too. Blocks that
    run in training mode only are closed in training mode.
    """
    reasons = _still_running(model, run, found, blocks, training=False)
    if any(block.training_only for block in found):
        there = _still_running(model, run, found, blocks, training=True)
        pairs = zip(reasons, there, found, strict=True)
        reasons = [why or (other if block.training_only else "") for why, other, block in pairs]
    return reasons


def _still_running(
    model: nn.Module,
    run: Callable[..., Any],
    found: Sequence[FoundBlock],
    blocks: Sequence[Block],
    training: bool,
) -> list[str]:
    with preserve_state(model), torch.no_grad(), force(blocks, OPEN):
        model.train(training)
        with counted_calls(model) as usual:
            run()
        try:
            with force(blocks, CLOSED), counted_calls(model) as called:
                run()
            reasons = [still_called(block, usual, called) for block in found]
        except Exception:  # close them one at a time, to see which one fails
            pairs = zip(found, blocks, strict=True)
            return [_running_alone(model, run, usual, each, block) for each, block in pairs]
        names = {module: name for name, module in model.named_modules()}
        shared = {
            block.name: ELSEWHERE.format(names[drop_path])
            for drop_path, block in drop_paths_of(model, found).items()
            if called.number[names[drop_path]]
        }
        return [why or shared.get(each.name, "") for why, each in zip(reasons, found, strict=True)]


def _running_alone(
    model: nn.Module, run: Callable[..., Any], usual: CallCounts, found: FoundBlock, block: Block
) -> str:
    """The reason why a block cannot be closed while all others are open; empty if it can."""
    try:
        with force([block], CLOSED), counted_calls(model) as called:
            run()
    except AdditionNotReachedError:
        return BRANCH_NOT_SEEN
    except Exception as error:
        return f"with it closed the model fails: {type(error).__name__}: {error}"
    return still_called(found, usual, called)


def still_called(block: FoundBlock, usual: CallCounts, called: CallCounts) -> str:
    """The reason why a closed block calls modules of its branch; empty if it calls none.

    Args:
        usual: the calls with every block open.
        called: the calls with this block closed.
    """
    running = [
        name
        for name, calls in block.modules.items()
        if called.number[name] > max(0, usual.number[name] - calls)
    ]
    if running and not (block.is_registered and len(running) < len(block.modules)):
        reason = called.why[running[0]]
        why = reason.text if reason else "the model uses its output for more than the addition"
        if reason and reason.hides_structure and block.units[0].edits[0][0] is not block.module:
            why += "; move these lines into the forward method of a layer, which is rewritten"
        return f"{running[0]!r} of its branch must run even when the block is closed: {why}"
    return ""


def refuse_running(
    blocks: Sequence[FoundBlock], usual: CallCounts, called: CallCounts, remark: str = ""
) -> None:
    """Raise `UnsupportedBlockError` if a closed block calls a module of its branch.

    Args:
        remark: a prefix of the reason, for example "in training mode ".
    """
    reasons = [(block, still_called(block, usual, called)) for block in blocks]
    running = [(block, why) for block, why in reasons if why]
    if running:
        (first, why), *others = running
        names = [block.name for block, _ in others]
        raise unsupported(first.name, first.module, remark + why, names)


@contextmanager
def counted_calls(model: nn.Module) -> Iterator[CallCounts]:
    """While entered, count the calls of all modules of `model`."""
    calls = CallCounts(Counter(), Counter(), {})

    def count(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            calls.number[name] += 1
            calls.why.setdefault(name, why_computed())
            calls.given[name] += sum(tensor.numel() for tensor in tensors_in((args, kwargs)))

        return hook

    handles = [
        module.register_forward_pre_hook(count(name), with_kwargs=True)
        for name, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def calls_if_finite(model: nn.Module, run: Callable[..., Any]) -> Counter[str] | None:
    """How often each module is called in evaluation mode. Gates that the model has are ignored.

    None if the model cannot run, or an output is not finite.
    """
    with preserve_state(model), ungated(model), torch.no_grad():
        model.eval()
        try:
            with counted_calls(model) as calls:
                outputs = tensors_in(run())
        except Exception:
            return None
    dense = [out for out in outputs if out.layout == torch.strided]
    return calls.number if all(bool(out.isfinite().all()) for out in dense) else None
