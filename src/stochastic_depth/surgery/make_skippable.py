"""Put gates into the blocks of a model and prove them; defer or leave out the blocks that fail."""

import math
import time
from collections import Counter
from collections.abc import Callable, Container, Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import nn

from stochastic_depth.block import Block
from stochastic_depth.choices import Scale
from stochastic_depth.errors import UnsupportedBlockError
from stochastic_depth.gates import GateKind
from stochastic_depth.hooks import batch_size
from stochastic_depth.residual import Residual
from stochastic_depth.surgery.blocks import (
    Found,
    branch_modules,
    is_inside,
    nothing_found,
    unsupported,
    with_remedy,
)
from stochastic_depth.surgery.droppath import Silenced, silence
from stochastic_depth.surgery.example import Example, caller, on_meta
from stochastic_depth.surgery.install import put_gates, take_gates
from stochastic_depth.surgery.proof.calls import still_running
from stochastic_depth.surgery.proof.check import check, reference_outputs
from stochastic_depth.surgery.proof.check_samples import (
    check_samples,
    halves,
    learn_samples,
    refuse_one,
)
from stochastic_depth.surgery.proof.check_training import check_training
from stochastic_depth.surgery.proof.other_inputs import run_on_other_inputs
from stochastic_depth.surgery.proof.visible import visible_branches
from stochastic_depth.surgery.select_modules import chosen_modules
from stochastic_depth.survival import Probabilities


@dataclass(frozen=True)
class Proved:
    """The blocks with their gates, and what the proof has found."""

    blocks: list[Block]
    difference: float
    """The largest difference of outputs, relative to the largest output; nan on the meta device."""
    resets: dict[str, Any]
    """Attributes that branches set, by name of module and attribute, with their first values."""


@dataclass(frozen=True)
class Skippable:
    """The blocks of a model that has been made skippable."""

    found: Sequence[Found]
    probabilities: Probabilities
    silenced: list[Silenced]
    proved: Proved


def make_skippable(
    model: nn.Module,
    find: Callable[[Container[str]], Sequence[Found]],
    probabilities_of: Callable[[Sequence[Found]], Probabilities],
    example: Example | None,
    gate: GateKind,
    scale: Scale,
    budget: float | None,
) -> Skippable:
    """Make all blocks skippable and prove it. Blocks that fail the proof are deferred.

    A block whose rewritten methods do not pass the proof is deferred. Where that does not help, the
    other blocks are tried without it, so that the error can say what to leave out.

    Args:
        find: finds the blocks; its argument names those that must be deferred.
        probabilities_of: returns the survival probabilities of blocks.

    Raises:
        UnsupportedBlockError: when a block cannot be made skippable.
    """
    failures: Counter[str] = Counter()
    """How many blocks of each class have failed."""
    deferred, left_out = set[str](), set[str]()
    failure: UnsupportedBlockError | None = None
    found = find(deferred)
    if not found:
        raise nothing_found(model, example)
    while kept := _others(model, found, left_out):
        silenced: list[Silenced] = []
        try:
            if refused := [block for block in kept if block.refusal]:
                first, *others = refused
                names = [block.name for block in others]
                raise unsupported(first.name, first.module, first.refusal, names)
            probabilities = probabilities_of(kept)
            silenced = silence(model, kept)
            proved = _gated_and_proved(model, kept, example, gate, scale, budget)
            if failure is None:
                kept = [block.without_recording() for block in kept]
                return Skippable(kept, probabilities, silenced, proved)
            _undo(model, silenced)
            break
        except UnsupportedBlockError as error:
            _undo(model, silenced)
            if error.of_model:
                raise failure or error from None
            culprits = _culprits(error, kept, failures)
            more = {b.name for b in culprits or kept if b.mechanism in ("slice", "call")}
            if more and example is not None:
                deferred |= more
                found = find(deferred)
                continue
            failure = failure or error
            if not culprits:
                raise
            left_out |= {block.name for block in culprits}
        except BaseException:
            _undo(model, silenced)
            raise
    assert failure is not None
    out = [block.name for block in found if block.name in left_out]
    raise with_remedy(failure, out, [block.name for block in kept]) from failure


def _culprits(
    error: UnsupportedBlockError, kept: Sequence[Found], failures: Counter[str]
) -> list[Found]:
    """The blocks that failed; if their class has failed before, all blocks of that class.

    Args:
        failures: how many blocks of each class have failed; updated here.
    """
    named = [block for block in kept if block.name in error.blocks]
    kinds = Counter(type(block.module).__name__ for block in named)
    repeated = {kind for kind in kinds if failures[kind]}
    failures.update(kinds)
    return named + [block for block in kept if type(block.module).__name__ in repeated]


def _others(model: nn.Module, found: Sequence[Found], left_out: Set[str]) -> list[Found]:
    """The blocks that remain if the user follows the advice to leave out `left_out`.

    The advice `exclude=` also leaves out blocks that have one of `left_out` in their branch. The
    advice `include=` does not.
    """
    rest = [block for block in found if block.name not in left_out]
    if not left_out or any(is_inside(block.name, of) for block in rest for of in left_out):
        return rest
    chosen = chosen_modules(model, None, sorted(left_out))
    return [
        block
        for block in rest
        if chosen.has(
            block.name,
            branch_modules(block.name, block.module)
            if isinstance(block.module, Residual)
            else block.modules,
        )
    ]


def _undo(model: nn.Module, silenced: Sequence[Silenced]) -> None:
    for drop_path in silenced:
        drop_path.restore()
    take_gates(model)


def _gated_and_proved(
    model: nn.Module,
    found: Sequence[Found],
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
    if on_meta(model, example):  # without values; sd.verify compares them later
        blocks = put_gates(model, found, select)
        if batch is not None and select:
            refuse_one(batch)
            half = next(halves(example, batch))
            learn_samples(model, (example, half), batch, found, blocks)
        for block, why in zip(found, still_running(model, run, found, blocks), strict=True):
            if why:
                raise unsupported(block.name, block.module, why)
        return Proved(blocks, math.nan, {})
    deadline = math.inf if budget is None else time.monotonic() + budget / 2
    with visible_branches(model, run):
        half = example if batch is None else check_samples(model, example, found, batch)
        other = run_on_other_inputs(model, example)
        reference = reference_outputs(model, run, found, batch, deadline, other)
        blocks = put_gates(model, found, select)
        if batch is not None and select:
            learn_samples(model, (example, half), batch, found, blocks)
        difference = check(model, run, found, blocks, reference, batch, gate)
        resets = check_training(model, run, found, blocks, batch, gate, scale)
    return Proved(blocks, difference, resets)
