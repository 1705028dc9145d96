"""Put gates into the blocks of a model and prove them; defer the blocks that fail."""

import math
import time
from collections.abc import Callable, Container, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from torch import nn

from stochastic_depth.block import Block
from stochastic_depth.choices import GateKind, Scale
from stochastic_depth.errors import UnsupportedBlockError
from stochastic_depth.hooks import batch_size
from stochastic_depth.surgery.blocks import (
    FoundBlock,
    is_inside,
    registered_functions,
    unsupported,
    with_remedy,
)
from stochastic_depth.surgery.droppath import Changed, disable_drop_paths, drop_paths_of
from stochastic_depth.surgery.example import Example, caller, on_meta
from stochastic_depth.surgery.find.branch_parameters import NamedRoutes
from stochastic_depth.surgery.find.find_blocks import Found
from stochastic_depth.surgery.install import put_gates, take_gates
from stochastic_depth.surgery.proof.batch_dimension import halves, learn_samples
from stochastic_depth.surgery.proof.call_counts import still_running
from stochastic_depth.surgery.proof.prove import Proved, prove
from stochastic_depth.surgery.select_modules import select_modules
from stochastic_depth.survival import Probabilities, Scheduled

_FURTHER_ATTEMPTS = 3
"""How often blocks of a failing class are tried again if no block of a different class is left."""


@dataclass(frozen=True)
class Skippable:
    """The blocks of a model that has been made skippable."""

    found: Sequence[FoundBlock]
    probabilities: Probabilities
    changed_settings: list[Changed]
    proved: Proved
    routes: NamedRoutes


class Candidates:
    """The blocks of a model, of which those that fail are deferred.

    Args:
        find: finds the blocks; its argument names those that must be deferred.
    """

    def __init__(self, find: Callable[[Container[str]], Found]) -> None:
        self.find = find
        self.deferred = set[str]()
        self.found = find(self.deferred)

    def defer(self, failed: Container[str]) -> bool:
        """Find the blocks again, with those of `failed` deferred for which that is possible.

        Returns:
            Whether there was one.
        """
        more = {b.name for b in self.found.blocks if b.name in failed and b.is_rewritten}
        if more:
            self.deferred |= more
            self.found = self.find(self.deferred)
        return bool(more)


def make_skippable(
    model: nn.Module,
    find: Callable[[Container[str]], Found],
    survival_of: Callable[[Sequence[FoundBlock]], Probabilities],
    *,
    find_whole: Callable[[Container[str]], Found] | None,
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
        survival_of: returns the survival probabilities of blocks.
        find_whole: as `find`, with one gate for all additions of a block; None if `find` does that.
        budget: about how many seconds the proof may take; None for no limit.

    Raises:
        UnsupportedBlockError: when a block cannot be made skippable.
    """
    candidates = Candidates(find)
    deadline = math.inf if budget is None else time.monotonic() + budget
    attempts = _Attempts(model, candidates, survival_of, example, gate, scale, deadline)
    made = attempts.without(frozenset())
    if isinstance(made, _Failure):
        as_whole = find_whole is not None and attempts.succeed_with(Candidates(find_whole))
        raise attempts.error_with_remedy(made, as_whole) from made.error
    return made


@dataclass(frozen=True)
class _Failure:
    """What stands in the way of making blocks skippable; the model is as it was before."""

    error: UnsupportedBlockError
    failed: frozenset[str]
    """The blocks that the error names."""
    given_up: frozenset[str]
    """These blocks; and all others of their class, if a block of it has failed before."""


@dataclass
class _Attempts:
    """Attempts to make the blocks of a model skippable, each with more blocks deferred."""

    model: nn.Module
    candidates: Candidates
    survival_of: Callable[[Sequence[FoundBlock]], Probabilities]
    example: Example | None
    gate: GateKind
    scale: Scale
    deadline: float
    """A time of `time.monotonic()`, after which proofs are shortened."""
    failed_classes: set[type] = field(default_factory=set)

    def without(self, left_out: Set[str]) -> Skippable | _Failure:
        """Make all blocks but `left_out` skippable; those that fail are deferred where possible."""
        while True:
            kept = self._kept(left_out)
            try:
                return self._attempt(kept)
            except UnsupportedBlockError as error:
                failure = self._failure(error, kept)
            culprits = failure.given_up or {block.name for block in kept}
            if failure.error.of_model or not self.candidates.defer(culprits):
                return failure

    def _attempt(self, kept: Sequence[FoundBlock]) -> Skippable:
        """Make the blocks `kept` skippable; if that fails, the model is as it was before."""
        if refused := [block for block in kept if block.refusal]:
            first, *others = refused
            names = [block.name for block in others]
            raise unsupported(first.name, first.module, first.refusal, names)
        whole = len(kept) == len(self.candidates.found.blocks)
        # Without some blocks it is tried for the sake of the advice, which needs no p_l.
        probabilities = self.survival_of(kept) if whole else _always_open(kept)
        drop_paths = drop_paths_of(self.model, kept)
        changed = disable_drop_paths(self.model, kept)
        try:
            proved = self._put_and_prove(kept, drop_paths)
        except BaseException:
            _undo(self.model, changed)
            raise
        return Skippable(kept, probabilities, changed, proved, self.candidates.found.routes)

    def _put_and_prove(
        self, kept: Sequence[FoundBlock], drop_paths: Mapping[nn.Module, FoundBlock]
    ) -> Proved:
        """Give every block its gates, and prove the blocks that are not `Residual` units."""
        model, example, select = self.model, self.example, self.gate == "subset"
        if example is None or not any(block.units for block in kept):
            return Proved(put_gates(model, kept, select), 0, 0.0, {})

        def put(half: Example) -> list[Block]:
            blocks = put_gates(model, kept, select)
            if select:
                learn_samples(model, kept, blocks, (example, half))
            return blocks

        if not on_meta(model, example):
            return prove(
                model,
                example,
                kept,
                gate=self.gate,
                scale=self.scale,
                put_gates=put,
                forward=model,
                deadline=self.deadline,
                drop_paths=drop_paths,
            )
        # There are no values to compare; sd.verify does it later.
        half = next(halves(example, batch_size(example))) if select else example
        blocks = put(half)
        running = still_running(model, caller(model, example), kept, blocks)
        for block, why in zip(kept, running, strict=True):
            if why:
                raise unsupported(block.name, block.module, why)
        return Proved(blocks, 0, math.nan, {})

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

    def succeed_with(self, candidates: Candidates) -> bool:
        """Whether all of these blocks can be made skippable in place of the others."""
        made = replace(self, candidates=candidates, survival_of=_always_open).without(frozenset())
        if isinstance(made, Skippable):
            _undo(self.model, made.changed_settings)
        return isinstance(made, Skippable)

    def error_with_remedy(self, first: _Failure, as_whole: bool) -> UnsupportedBlockError:
        """The error of the first failure, with a sentence that says which blocks to leave out.

        Args:
            as_whole: as `with_remedy`.

        The others are tried first without the classes that fail, which takes few attempts; if
        nothing is left then, without the failing blocks alone; and at last without one half of
        those that fail together, as blocks that share a module may do.
        """
        left_out, failed = set[str](), set[str]()
        outcome: Skippable | _Failure = first
        while isinstance(outcome, _Failure):
            if outcome.error.of_model:
                return first.error
            if not outcome.given_up:
                return outcome.error
            left_out |= outcome.given_up
            failed |= outcome.failed
            if not self._kept(left_out):
                break
            outcome = self.without(left_out)
        for _ in range(_FURTHER_ATTEMPTS):
            if isinstance(outcome, Skippable) or not self._kept(failed):
                break
            left_out = set(failed)
            outcome = self.without(left_out)
            failed |= outcome.failed if isinstance(outcome, _Failure) else set()
        together = first.error.blocks  # one half of them may work without the other
        for half in (together[: len(together) // 2], together[len(together) // 2 :]):
            rest = failed - {*together} | {*half}
            if isinstance(outcome, _Failure) and half and self._kept(rest):
                left_out, outcome = rest, self.without(rest)
        out = [block.name for block in self.candidates.found.blocks if block.name in left_out]
        named = [block for block in self.candidates.found.blocks if block.name in first.failed]
        registered = registered_functions(block for block in named if not block.refusal)
        if isinstance(outcome, _Failure):
            return with_remedy(first.error, out, [], not self._kept(failed), registered, as_whole)
        _undo(self.model, outcome.changed_settings)
        kept = [block.name for block in outcome.found]
        return with_remedy(first.error, out, kept, registered=registered, as_whole=as_whole)

    def _kept(self, left_out: Set[str]) -> list[FoundBlock]:
        """The blocks that remain if the user follows the advice to leave out `left_out`.

        The advice `exclude=` also leaves out blocks that have one of `left_out` in their branch.
        The advice `include=` does not.
        """
        rest = [block for block in self.candidates.found.blocks if block.name not in left_out]
        if not left_out or any(is_inside(block.name, out) for block in rest for out in left_out):
            return rest
        selected = select_modules(self.model, None, sorted(left_out))
        return [block for block in rest if selected.allows(block.name, block.names_in_branch())]


def _always_open(found: Sequence[FoundBlock]) -> Probabilities:
    return Scheduled((1.0,) * len(found))


def _undo(model: nn.Module, changed: Sequence[Changed]) -> None:
    for setting in changed:
        setting.restore()
    take_gates(model)
