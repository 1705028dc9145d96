"""Prove in training mode what `evaluation` proves, and that a training step works."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError

from stochastic_depth.errors import (
    AdditionNotReachedError,
    BypassedAdditionWarning,
    StochasticDepthError,
    UnsupportedBlockError,
)
from stochastic_depth.gates import CLOSED, OPEN, Gate
from stochastic_depth.hooks import refuse_cache
from stochastic_depth.surgery.blocks import FoundBlock, unsupported
from stochastic_depth.surgery.droppath import ELSEWHERE
from stochastic_depth.surgery.example import sum_of_outputs
from stochastic_depth.surgery.model_state import preserve_state
from stochastic_depth.surgery.proof.call_counts import CallCounts, counted_calls, refuse_running
from stochastic_depth.surgery.proof.comparison import Comparison, smallest, trials
from stochastic_depth.surgery.proof.gated import Gated

TRAINING_PASSES = 4
"""How many passes in training mode, with every gate open, must each reach every block."""


def check_training(gated: Gated) -> dict[str, Any]:
    """Check that in training mode open blocks are reached, and closed blocks run nothing.

    Returns:
        The attributes to which a branch assigns a tensor with a graph, by name of module and
        attribute, with their values from before. They have to be reset before each pass.

    Raises:
        UnsupportedBlockError: when the model itself drops a block, when training mode runs it on a
            different path, or when its backward pass fails, for example because a tensor was
            changed in place.
    """
    with preserve_state(gated.model), torch.enable_grad(), warnings.catch_warnings():
        # The checks below cover a different path in training mode.
        warnings.simplefilter("ignore", BypassedAdditionWarning)
        gated.model.train()
        try:
            before = _attributes(gated.model)
            usual = _passes_reach_every_block(gated)
            opened = _attributes(gated.model)
            _closed_runs_nothing(gated, usual)
            resets = _attributes_set(gated, before, opened, _attributes(gated.model))
            _compare(gated)
            for state, gate in _training_gates(gated).items():
                for first in (1, 0):  # every other block, so that each has the gate in one step
                    numbers = gated.everything[first::2]
                    if why := _why_not_trained(gated, gate, numbers):
                        if original := _why_original_fails(gated):
                            return _not_proved(original)
                        raise _fails(gated, state, gate, numbers, why)
        except AdditionNotReachedError as error:
            raise _unreached(error, gated.found) from error
        except StochasticDepthError:
            raise
        except Exception as error:
            if original := _why_original_fails(gated):
                return _not_proved(original)
            why = _why_not_trained(gated, CLOSED, gated.everything)
            why = why or f"{type(error).__name__}: {error}"
            raise _fails(gated, "closed", CLOSED, gated.everything, why) from error
    return resets


def _training_gates(gated: Gated) -> dict[str, Gate]:
    """The gates that blocks have in training steps, by the state of the block."""
    gates = {"closed": CLOSED}
    if gated.batch is not None:
        gates["open for half of the samples"] = gated.half(gated.batch)[0]
    return gates


def _attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The attributes of each module, by its name."""
    return {name: dict(vars(module)) for name, module in model.named_modules()}


def _passes_reach_every_block(gated: Gated) -> CallCounts:
    """Check that passes with all gates open run every block; returns the calls of the first."""
    with gated.with_gate(OPEN):
        passes = [_counted(gated, seed) for seed in range(TRAINING_PASSES)]
    names = {module: name for name, module in gated.model.named_modules()}
    for block in gated.found:
        if missed := _missed(block, passes, names):
            raise unsupported(
                block.name,
                block.module,
                f"in {missed} of {len(passes)} passes in training mode the model itself leaves it "
                "out: set the model's own layer drop or drop path to 0, because sd.apply takes its "
                "place",
                of_model=missed < len(passes),  # by chance, which may leave out others too
            )
    return passes[0]


def _closed_runs_nothing(gated: Gated, usual: CallCounts) -> None:
    """Check that closed blocks call no module of their branches.

    Args:
        usual: the calls with every block open.
    """
    for _ in range(2):  # the second pass may use what the first has left
        with gated.with_gate(CLOSED, gated.everything):
            called = _counted(gated, 0)
        refuse_running(gated.found, usual, called, "in training mode ")
        _refuse_drop_paths(gated, called)


def _refuse_drop_paths(gated: Gated, called: CallCounts) -> None:
    """Refuse a disabled drop path that is called with every block closed, as `called` counts."""
    for name, module in gated.model.named_modules():
        if module in gated.drop_paths and called.number[name]:
            block = gated.drop_paths[module]
            where = ELSEWHERE.format(name)
            raise unsupported(block.name, block.module, where, of_model=True)


def _compare(gated: Gated) -> None:
    """Compare the model with its original.

    Dropout is disabled in both, because a closed branch draws no random numbers.
    """
    with preserve_state(gated.model) as restore, _SteadyDropout(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # checkpoints warn of inputs without gradients
        comparison = Comparison(gated, restore)
        for trial in trials(gated):
            comparison.check(trial)


class _SteadyDropout(TorchFunctionMode):
    """While entered, dropout draws no random numbers.

    It keeps every value; in place, it halves every value. So a branch that changes its shortcut in
    place is noticed, because a closed block does not change it.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if "dropout" in name and args and isinstance(args[0], Tensor):
            given = dict(zip(("p", "training", "inplace"), args[1:], strict=False)) | kwargs
            drops = given.get("training", given.get("train", True)) and given.get("p") != 0
            in_place = name.endswith("_") or given.get("inplace")
            return args[0].mul_(0.5) if drops and in_place else args[0] + 0
        if name == "scaled_dot_product_attention":
            kwargs.pop("dropout_p", None)
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
        elif name == "multi_head_attention_forward":
            kwargs["training"] = False
        return func(*args, **kwargs)


def _fails(
    gated: Gated, state: str, gate: Gate, numbers: list[int], why: str
) -> UnsupportedBlockError:
    """The error for a training step that fails while the blocks `numbers` have `gate`.

    Args:
        state: the state of the blocks under the gate.
        why: why it fails.
    """
    culprits, why = smallest(numbers, why, functools.partial(_why_not_trained, gated, gate))
    first = gated.found[culprits[0] if culprits else 0]
    names = [gated.found[n].name for n in culprits[1:]]
    reason = f"with it {state} a training step fails: {why}"
    return unsupported(first.name, first.module, reason, names)


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


def _why_original_fails(gated: Gated) -> str:
    """Why the original model cannot take a training step on the example; empty if it can."""
    try:
        with gated.original():
            train_once(gated.run)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _why_not_trained(gated: Gated, gate: Gate, numbers: list[int]) -> str:
    """Why a training step with `gate` at the blocks `numbers` fails; empty if it does not."""
    try:
        with gated.with_gate(gate, numbers):
            train_once(gated.run)
    except StochasticDepthError:
        raise
    except CheckpointError:
        return CHECKPOINTED
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


CHECKPOINTED = (
    "a checkpoint recomputes its branch without its gate: checkpoint the module that adds, "
    'checkpoint(layer, x), or use gate="batch" for this model'
)


def _counted(gated: Gated, seed: int) -> CallCounts:
    with counted_calls(gated.model) as calls:
        refuse_cache(gated.run(seed))
    return calls


def _missed(block: FoundBlock, passes: Sequence[CallCounts], names: Mapping[nn.Module, str]) -> int:
    """In how many of `passes`, in which every gate is open, a part of a block does not run.

    Args:
        names: the names of all modules. If a branch calls no module, the module that adds must run.
    """
    missed = [0]
    for unit in block.units:
        runs = unit.modules or {names[module] for module, _ in unit.edits if module in names}
        if runs:
            missed.append(sum(not any(p.number[name] for name in runs) for p in passes))
    return max(missed)


def _attributes_set(
    gated: Gated,
    before: Mapping[str, Mapping[str, Any]],
    opened: Mapping[str, Mapping[str, Any]],
    closed: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Attributes in which a branch keeps a tensor with a graph, with their old values.

    They are attributes of the modules of a branch, and those of other modules that closed blocks
    leave as they are.

    Args:
        before: the attributes of each module before any pass.
        opened: after passes with all gates open.
        closed: after further passes with all gates closed.

    Raises:
        UnsupportedBlockError: when such an attribute had no value before the pass.
    """
    kept: dict[str, Any] = {}
    block_of = {name: block for block in gated.found for name in block.modules}
    for name, attributes in opened.items():
        module = gated.model.get_submodule(name)
        for attribute, value in attributes.items():
            if not _has_graph(value) or _is_made_by_hook(module, attribute):
                continue
            if name not in block_of and closed.get(name, {}).get(attribute) is not value:
                continue
            old = before[name].get(attribute)
            if attribute not in before[name] or _has_graph(old):
                around = (block for block in gated.found if name == block.name)
                block = block_of.get(name) or next(around, gated.found[0])
                raise unsupported(
                    block.name,
                    block.module,
                    f"its branch sets {attribute!r} of {name!r} to a tensor with a graph, which a "
                    "closed block would leave there from an earlier step: in __init__, set the "
                    "attribute to its value for a closed block, such as torch.zeros(())",
                )
            kept[f"{name}.{attribute}"] = old
    return kept


def _has_graph(value: object) -> bool:
    return isinstance(value, Tensor) and value.grad_fn is not None


def _is_made_by_hook(module: nn.Module, attribute: str) -> bool:
    """Whether weight_norm, spectral_norm or pruning computes the attribute before each call."""
    return any(f"{attribute}_{part}" in module._parameters for part in ("v", "orig"))


def train_once(run: Callable[..., Any]) -> None:
    """A forward pass, and the backward pass of the sum of all its outputs."""
    output = run()
    refuse_cache(output)
    loss = sum_of_outputs(output)
    if loss is not None:
        loss.backward()
