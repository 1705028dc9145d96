"""Prove in evaluation mode that the blocks of a model do what they should under their gates."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.errors import ApplyError, UnsupportedBlockError
from stochastic_depth.gates import OPEN
from stochastic_depth.hooks import refuse_cache
from stochastic_depth.surgery.blocks import registered_functions, unsupported
from stochastic_depth.surgery.model_state import preserve_state
from stochastic_depth.surgery.proof.call_counts import CallCounts, counted_calls, refuse_running
from stochastic_depth.surgery.proof.comparison import (
    TOLERANCE,
    Comparison,
    Results,
    Trial,
    trials,
)
from stochastic_depth.surgery.proof.gated import Gated
from stochastic_depth.tensors import largest_difference, tensors_in


def untouched_outputs(model: nn.Module, run: Callable[..., Any]) -> list[Tensor]:
    """The outputs of a model in evaluation, before it has gates.

    Raises:
        ApplyError: when the model returns no tensor that could be compared, or no finite number.
        GateError: when it returns a cache of keys and values.
    """
    with preserve_state(model), torch.no_grad():
        model.eval()
        output = run()
    refuse_cache(output)
    if tensors := tensors_in(output):
        _require_finite(model, tensors)
        return tensors
    raise ApplyError(
        f"no tensor was found in the output of {type(model).__name__}, a {type(output).__name__}, "
        "so nothing can be proved: return a tensor, a tuple, a dict or a dataclass of them, or "
        "register the class with torch.utils._pytree"
    )


def _require_finite(model: nn.Module, outputs: list[Tensor]) -> None:
    """Raise `ApplyError` if all floating-point outputs are nan or infinite in every number."""
    floating = [x for x in outputs if x.is_floating_point() and x.numel() and not x.is_meta]
    if floating and not any(x.isfinite().any() for x in floating):
        raise ApplyError(
            f"{type(model).__name__} returns no finite number on the example, so nothing can be "
            "proved: give an example, and weights, for which its outputs are finite"
        )


def check_evaluation(gated: Gated, untouched: list[Tensor]) -> tuple[int, float]:
    """Compare the model with its original.

    Args:
        untouched: the outputs of the original on the example, before the model had gates.

    Returns:
        How many sets of blocks were closed; and the largest difference of outputs with blocks
        closed, relative to the largest output.

    Raises:
        UnsupportedBlockError: when an output differs, or a closed branch runs; the error names the
            block.
    """
    with preserve_state(gated.model):
        gated.model.eval()
        with preserve_state(gated.model) as restore:
            return _check(gated, Comparison(gated, restore), untouched)


def _check(gated: Gated, comparison: Comparison, untouched: list[Tensor]) -> tuple[int, float]:
    sets, largest = 0, 0.0
    usual = _check_open(gated, comparison.restore, untouched)
    for trial in trials(gated):
        expected = comparison.expected(trial, trial.blocks)
        with counted_calls(gated.model) as called:
            difference = comparison.check(trial, expected)
        if not trial.gate.open:
            refuse_running([gated.found[n] for n in trial.blocks], usual, called)
            if sets < 2:
                _check_without_hooks(comparison, trial, expected)
            sets, largest = sets + 1, max(largest, difference)
        elif trial.keep is not None and gated.gate == "subset":
            _refuse_all_samples(gated, trial, usual, called)
    return sets, largest


def _check_open(gated: Gated, restore: Callable[[], None], untouched: list[Tensor]) -> CallCounts:
    """Check that with every gate open, and without gates, outputs are the same, bit for bit.

    Returns:
        The calls of modules with every gate open.
    """
    comparison = Comparison(replace(gated, other=gated.run), restore)
    every = Trial([], OPEN, "open")
    with counted_calls(gated.model) as usual:
        difference, why = comparison.difference(every, [], Results(untouched))
    if difference:
        remark = comparison.why_nondeterministic(draws=True)
        if not remark and (functions := registered_functions(gated.found)):
            remark = f": look at {functions}"
        raise UnsupportedBlockError(f"with every gate open {why}{remark}")
    restore()
    if largest_difference(untouched, comparison.expected(every, []).outputs):
        raise UnsupportedBlockError(
            f"{type(gated.model).__name__} is not itself again when its gates are taken: its "
            f"outputs differ from those before{comparison.why_nondeterministic(draws=True)}"
        )
    if gated.other is not gated.run:
        with torch.no_grad(), gated.with_gate(OPEN), counted_calls(gated.model) as usual:
            gated.other()
    return usual


def _check_without_hooks(comparison: Comparison, trial: Trial, expected: Results) -> None:
    """Check a set of closed blocks without hooks, as users run the model."""
    for gradients in (False, True):
        state = (
            f"closed, in evaluation {'with' if gradients else 'without'} gradients and without "
            "hooks, where the model takes a fused or cached path,"
        )
        around = partial(_fast_path, gradients)
        fast = replace(trial, state=state, tolerance=10 * TOLERANCE, around=around)
        comparison.check(fast, expected)


def _refuse_all_samples(gated: Gated, trial: Trial, usual: CallCounts, called: CallCounts) -> None:
    """Raise `UnsupportedBlockError` if a branch ran on all samples, though half were drawn."""
    for block in (gated.found[n] for n in trial.blocks):
        if block.training_only or not block.modules:
            continue
        if all(called.given[name] == usual.given[name] for name in block.modules):
            raise unsupported(block.name, block.module, "its branch runs on all samples")


@contextmanager
def _fast_path(gradients: bool) -> Iterator[None]:
    """While entered, PyTorch's transformer layers use their fused path, as in ordinary use."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(True)
    try:
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
