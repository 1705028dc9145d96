"""Put gates into the blocks of a model and prove them; defer the blocks that fail."""

import math
import time
from collections.abc import Callable, Container, Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import nn

from stochastic_depth.block import Block
from stochastic_depth.choices import Scale
from stochastic_depth.errors import UnsupportedBlockError
from stochastic_depth.gates import GateKind
from stochastic_depth.hooks import batch_size
from stochastic_depth.surgery.blocks import (
    FoundBlock,
    is_inside,
    nothing_found,
    unsupported,
    with_remedy,
)
from stochastic_depth.surgery.droppath import ChangedSetting, disable_drop_paths
from stochastic_depth.surgery.example import Example, caller, on_meta
from stochastic_depth.surgery.install import put_gates, take_gates
from stochastic_depth.surgery.proof.batch_dimension import (
    check_samples,
    halves,
    learn_samples,
    require_two_samples,
)
from stochastic_depth.surgery.proof.call_counts import still_running
from stochastic_depth.surgery.proof.evaluation import check, reference_outputs
from stochastic_depth.surgery.proof.nonzero_weights import nonzero_weights
from stochastic_depth.surgery.proof.other_inputs import run_on_other_inputs
from stochastic_depth.surgery.proof.training_steps import check_training
from stochastic_depth.surgery.select_modules import select_modules
from stochastic_depth.survival import Probabilities

_FURTHER_ATTEMPTS = 3
"""How often blocks of a failing class are tried again if no block of a different class is left."""


@dataclass(frozen=True)
class Proved:
    """Blocks with gates, and the results of their proof."""

    blocks: list[Block]
    difference: float
    """The largest difference of outputs, relative to the largest output; nan on the meta device."""
    resets: dict[str, Any]
    """Attributes that branches set, by name of module and attribute, with their initial values."""


@dataclass(frozen=True)
class Skippable:
    """The blocks of a model that has been made skippable."""

    found: Sequence[FoundBlock]
    probabilities: Probabilities
    changed_settings: list[ChangedSetting]
    proved: Proved


@dataclass(frozen=True)
class _Failure:
    """An attempt to make blocks skippable that has failed; the model is as it was before."""

    error: UnsupportedBlockError
    failed: frozenset[str]
    """The blocks that the error names."""
    given_up: frozenset[str]
    """These blocks; and all others of their class, if a block of it has failed before."""


def make_skippable(
    model: nn.Module,
    find: Callable[[Container[str]], Sequence[FoundBlock]],
    probabilities_of: Callable[[Sequence[FoundBlock]], Probabilities],
    example: Example | None,
    gate: GateKind,
    scale: Scale,
    budget: float | None,
) -> Skippable:
    """Make all blocks skippable, and prove it.

    A block that fails the proof with rewritten methods is deferred. If a block cannot be made
    skippable, the others are tried without it, so that the error can say what to leave out.

    Args:
        find: finds the blocks; its argument names those that must be deferred.
        probabilities_of: returns the survival probabilities of blocks.

    Raises:
        UnsupportedBlockError: when a block cannot be made skippable.
    """
    attempts = _Attempts(model, find, probabilities_of, example, gate, scale, budget)
    made = attempts.defer_until_proved(frozenset())
    if isinstance(made, Skippable):
        return made
    raise attempts.named_with_remedy(made) from made.error


class _Attempts:
    """Attempts to make the blocks of a model skippable, each with more blocks deferred."""

    def __init__(
        self,
        model: nn.Module,
        find: Callable[[Container[str]], Sequence[FoundBlock]],
        probabilities_of: Callable[[Sequence[FoundBlock]], Probabilities],
        example: Example | None,
        gate: GateKind,
        scale: Scale,
        budget: float | None,
    ) -> None:
        self.model, self.find, self.probabilities_of = model, find, probabilities_of
        self.example, self.budget = example, budget
        self.gate: GateKind = gate
        self.scale: Scale = scale
        self.deferred = set[str]()
        self.failed_classes = set[type]()
        self.found = find(self.deferred)
        if not self.found:
            raise nothing_found(model, example)

    def defer_until_proved(self, left_out: Set[str]) -> Skippable | _Failure:
        """Make all blocks but `left_out` skippable; those that fail are deferred where possible."""
        while True:
            kept = _without(self.model, self.found, left_out)
            try:
                return self._gated_and_proved(kept)
            except UnsupportedBlockError as error:
                failure = self._failure(error, kept)
            culprits = [block for block in kept if block.name in failure.given_up] or kept
            more = {block.name for block in culprits if block.can_be_deferred}
            if failure.error.of_model or not more or self.example is None:
                return failure
            self.deferred |= more
            self.found = self.find(self.deferred)

    def named_with_remedy(self, first: _Failure) -> UnsupportedBlockError:
        """The error of the first failure, with a sentence that says which blocks to leave out."""
        left_out, failed = set[str](), set[str]()
        outcome: Skippable | _Failure = first
        while isinstance(outcome, _Failure):
            if outcome.error.of_model:
                return first.error
            if not outcome.given_up:
                return outcome.error
            left_out |= outcome.given_up
            failed |= outcome.failed
            if not _without(self.model, self.found, left_out):
                break
            outcome = self.defer_until_proved(left_out)
        for _ in range(_FURTHER_ATTEMPTS):  # with blocks that were given up because of their class
            if isinstance(outcome, Skippable) or not _without(self.model, self.found, failed):
                break
            left_out = set(failed)
            outcome = self.defer_until_proved(left_out)
            failed |= outcome.failed if isinstance(outcome, _Failure) else set()
        out = [block.name for block in self.found if block.name in left_out]
        if isinstance(outcome, _Failure):
            tried_all = not _without(self.model, self.found, failed)
            return with_remedy(first.error, out, [], tried_all)
        _undo(self.model, outcome.changed_settings)
        return with_remedy(first.error, out, [block.name for block in outcome.found])

    def _gated_and_proved(self, kept: Sequence[FoundBlock]) -> Skippable:
        """Make the blocks `kept` skippable; if that fails, the model is as it was before."""
        if refused := [block for block in kept if block.refusal]:
            first, *others = refused
            names = [block.name for block in others]
            raise unsupported(first.name, first.module, first.refusal, names)
        probabilities = self.probabilities_of(kept)
        changed = disable_drop_paths(self.model, kept)
        try:
            proved = _gated_and_proved(
                self.model, kept, self.example, self.gate, self.scale, self.budget
            )
        except BaseException:
            _undo(self.model, changed)
            raise
        kept = [block.without_recording() for block in kept]
        return Skippable(kept, probabilities, changed, proved)

    def _failure(self, error: UnsupportedBlockError, kept: Sequence[FoundBlock]) -> _Failure:
        named = [block for block in kept if block.name in error.blocks]
        classes = {type(block.module) for block in named}
        repeated = classes & self.failed_classes
        self.failed_classes |= classes
        alike = [block for block in kept if type(block.module) in repeated]
        return _Failure(
            error,
            frozenset(block.name for block in named),
            frozenset(block.name for block in [*named, *alike]),
        )


def _without(model: nn.Module, found: Sequence[FoundBlock], left_out: Set[str]) -> list[FoundBlock]:
    """The blocks that remain if the user follows the advice to leave out `left_out`.

    The advice `exclude=` also leaves out blocks that have one of `left_out` in their branch. The
    advice `include=` does not.
    """
    rest = [block for block in found if block.name not in left_out]
    if not left_out or any(is_inside(block.name, out) for block in rest for out in left_out):
        return rest
    selected = select_modules(model, None, sorted(left_out))
    return [block for block in rest if selected.allows(block.name, block.names_in_branch())]


def _undo(model: nn.Module, changed: Sequence[ChangedSetting]) -> None:
    for setting in changed:
        setting.restore()
    take_gates(model)


def _gated_and_proved(
    model: nn.Module,
    found: Sequence[FoundBlock],
    example: Example | None,
    gate: GateKind,
    scale: Scale,
    budget: float | None,
) -> Proved:
    """Give every block its gates, and prove the blocks that are not `Residual` units."""
    select = gate == "subset"
    if example is None or not any(block.units for block in found):
        return Proved(put_gates(model, found, select), 0.0, {})
    run = caller(model, example)
    batch = None if gate == "batch" else batch_size(example)
    if on_meta(model, example):  # there are no values to compare; sd.verify does it later
        blocks = put_gates(model, found, select)
        if batch is not None and select:
            require_two_samples(batch)
            half = next(halves(example, batch))
            learn_samples(model, (example, half), batch, found, blocks)
        for block, why in zip(found, still_running(model, run, found, blocks), strict=True):
            if why:
                raise unsupported(block.name, block.module, why)
        return Proved(blocks, math.nan, {})
    deadline = math.inf if budget is None else time.monotonic() + budget / 2
    with nonzero_weights(model, run):
        half = example if batch is None else check_samples(model, example, found, batch)
        other = run_on_other_inputs(model, example)
        reference = reference_outputs(model, run, found, batch, deadline, other)
        blocks = put_gates(model, found, select)
        if batch is not None and select:
            learn_samples(model, (example, half), batch, found, blocks)
        difference = check(model, run, found, blocks, reference, batch, gate)
        resets = check_training(model, run, found, blocks, batch, gate, scale)
    return Proved(blocks, difference, resets)
