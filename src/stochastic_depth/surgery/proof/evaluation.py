"""Prove in evaluation mode that the blocks of a model do what they should under their gates.

The reference is computed independently: the whole original model runs, branches included, and only
the results of some additions are replaced by their shortcuts (`bypassed`).
"""

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from stochastic_depth.errors import AdditionNotReachedError, ApplyError, UnsupportedBlockError
from stochastic_depth.gates import CLOSED, OPEN, Gate
from stochastic_depth.hooks import refuse_cache
from stochastic_depth.residual import Residual
from stochastic_depth.surgery.blocks import FoundBlock, unsupported
from stochastic_depth.surgery.edits import BRANCH_NOT_SEEN
from stochastic_depth.surgery.example import preserve_state
from stochastic_depth.surgery.install import ungated
from stochastic_depth.surgery.proof.call_counts import CallCounts, counted_calls, refuse_running
from stochastic_depth.surgery.proof.gated import (
    HALF,
    TIMES_HALF,
    Gated,
    closed_sets,
    every_other_kept,
    smallest,
)
from stochastic_depth.surgery.proof.reference import bypassed
from stochastic_depth.tensors import largest_difference, tensors_in

TOLERANCE = 1e-5
"""The largest accepted difference with closed blocks, relative to the largest output. The outputs
may differ a little, because sums may be computed in a different order."""

Outputs = list[Tensor]


@dataclass(frozen=True)
class Reference:
    """Outputs of the original model with no block closed, and with each of several sets closed."""

    open: Outputs
    closed: tuple[frozenset[int], ...]
    """The sets of closed blocks, given by the numbers of the blocks."""
    run: Callable[..., Any]
    """Calls the model on the inputs for `outputs`: other ones than the example, if it can."""
    outputs: tuple[Outputs, ...]
    """The outputs for each set, with its blocks closed."""
    selected: tuple[Outputs, ...]
    """The outputs for each set, with its blocks open for every other sample only."""
    remembers: bool
    """Whether a second call with the same inputs has different outputs."""


def reference_outputs(
    model: nn.Module,
    run: Callable[..., Any],
    other: Callable[..., Any],
    found: Sequence[FoundBlock],
    batch: int | None,
    deadline: float,
) -> Reference:
    """Run the original model in evaluation mode, with its additions bypassed set by set.

    Args:
        run: calls the model; its argument is a seed for the random number generators.
        other: as `run`, on other inputs if the model can run on them.
        batch: the number of samples in the example, for gates of single samples.
        deadline: a time of `time.monotonic()`, after which no further set is begun.

    Raises:
        ApplyError: when the model returns no tensor that could be compared.
        GateError: when it returns a cache of keys and values.
    """
    outputs, selected, sets = [], [], []
    with preserve_state(model), torch.no_grad():
        model.eval()
        whole = run()
        refuse_cache(whole)
        expected = tensors_in(whole)
        if not expected:
            raise ApplyError(
                f"no tensor was found in the output of {type(model).__name__}, a "
                f"{type(whole).__name__}, so nothing can be proved: return a tensor, a tuple, a "
                "dict or a dataclass of them, or register the class with torch.utils._pytree"
            )
        remembers = not _equal(expected, tensors_in(run()))
        keep = None if batch is None else every_other_kept(batch)
        for closed in closed_sets(len(found)):
            if sets and time.monotonic() > deadline:
                break
            blocks = [found[n] for n in closed]
            with bypassed(blocks):
                outputs.append(tensors_in(other()))
            if keep is not None:
                with bypassed(blocks, keep):
                    selected.append(tensors_in(run()))
            sets.append(closed)
    outputs, selected = tuple(outputs), tuple(selected)
    return Reference(expected, tuple(sets), other, outputs, selected, remembers)


def check_evaluation(gated: Gated, reference: Reference) -> float:
    """Compare the model with the reference.

    Returns:
        The largest difference of outputs with blocks closed, relative to the largest output.

    Raises:
        UnsupportedBlockError: when an output differs, or a closed branch runs; the error names the
            block.
    """
    difference = 0.0
    proof = _Evaluation(gated, reference)
    model, found = gated.model, gated.found
    sets = list(zip(reference.closed, reference.outputs, strict=True))
    with preserve_state(model):
        model.eval()
        with gated.evaluated_with(OPEN, ()), counted_calls(model) as usual:
            proof.check_open(reference.open)
        if reference.run is not gated.run:
            with gated.evaluated_with(OPEN, ()), torch.no_grad(), counted_calls(model) as usual:
                reference.run()
        for number, (closed, expected) in enumerate(sets):
            proof.run_before()
            with gated.evaluated_with(CLOSED, closed):
                with counted_calls(model) as called:
                    difference = max(difference, proof.check_closed(closed, expected))
                refuse_running([found[n] for n in sorted(closed)], usual, called)
                if number < 2:
                    proof.check_without_hooks(closed, expected)
        proof.check_times_half()
        if gated.batch is not None:
            for closed, expected in zip(reference.closed, reference.selected, strict=True):
                proof.check_on_samples(closed, expected, usual, gated.batch)
    return difference


class _Evaluation:
    """Compares the outputs of a model with gates, and says what is wrong if they differ."""

    def __init__(self, gated: Gated, reference: Reference) -> None:
        self.gated, self.found = gated, gated.found
        self.example, self.run = gated.run, reference.run
        """Call the model: on the example, and on other inputs if it can run on them."""
        self.remembers = reference.remembers

    def run_before(self) -> None:
        """Run the model on the example with all gates open, before it runs on other inputs.

        What a branch leaves on an object is then that of the example.
        """
        if self.run is not self.example:
            with self.gated.evaluated_with(OPEN, ()), torch.no_grad():
                self.example()

    def check_open(self, expected: Outputs) -> None:
        """Check that with every gate open the outputs equal the original ones, bit for bit."""
        difference, why = self._outcome(expected, run=self.example)
        if difference:
            raise UnsupportedBlockError(f"with every gate open {why}{self._remark()}")

    def check_closed(self, closed: frozenset[int], expected: Outputs) -> float:
        """Check a set of closed blocks; returns the largest relative difference of the outputs."""
        difference, why = self._outcome(expected)
        if not difference <= TOLERANCE:
            self._raise_for_smallest(
                sorted(closed), why, lambda part: self._wrong(part, CLOSED), "closed", closed=True
            )
        return difference

    def check_without_hooks(self, closed: frozenset[int], expected: Outputs) -> None:
        """Check a set of closed blocks without hooks, as users run the model."""
        for gradients in (False, True):
            with _fast_path():
                difference, why = self._outcome(expected, gradients)
            if difference > 10 * TOLERANCE:
                wrong = functools.partial(self._wrong_without_hooks, gradients=gradients)
                how = "with" if gradients else "without"
                self._raise_for_smallest(
                    sorted(closed),
                    why,
                    wrong,
                    f"closed, in evaluation {how} gradients and without hooks, where the model "
                    "takes a fused or cached path,",
                    closed=True,
                )

    def check_times_half(self) -> None:
        """Check that a gate multiplies the branch, once and before anything that follows."""
        numbers = [n for n, b in enumerate(self.found) if not isinstance(b.module, Residual)]
        wrong = functools.partial(self._wrong, gate=TIMES_HALF, factor=HALF)
        if numbers and (why := wrong(numbers)):
            registered = any(self.found[n].is_registered for n in numbers)
            hint = " (a registered function must use gate.scale, once)" if registered else ""
            self._raise_for_smallest(numbers, why, wrong, f"multiplied by {HALF}{hint}")

    def check_on_samples(
        self, numbers: frozenset[int], expected: Outputs, usual: CallCounts, batch: int
    ) -> None:
        """Check a set of blocks that are open for every other sample only."""
        half, keep = self.gated.half(batch)
        with (
            self.gated.evaluated_with(half, numbers),
            counted_calls(self.gated.model) as called,
        ):
            difference, why = self._outcome(expected, run=self.example)
        if not difference <= 10 * TOLERANCE:
            wrong = functools.partial(self._wrong, gate=half, keep=keep)
            self._raise_for_smallest(sorted(numbers), why, wrong, "open for half of the samples")
        for n in sorted(numbers) if self.gated.gate == "subset" else ():
            block = self.found[n]
            if block.training_only:
                continue
            if block.modules and all(called.given[m] == usual.given[m] for m in block.modules):
                raise unsupported(block.name, block.module, "its branch runs on all samples")

    def _wrong(
        self, part: list[int], gate: Gate, keep: Tensor | None = None, factor: float = 0.0
    ) -> str:
        """What is wrong with `gate` at the blocks `part`; empty if nothing is.

        Args:
            keep: bool [batch], the samples for which `gate` is open; None for all or none.
            factor: what `gate` multiplies the branches by; 0 if it is closed.
        """
        run = self.run if keep is None else self.example
        with self.gated.original(part, keep, factor), torch.no_grad():
            expected = tensors_in(run())
        self.run_before()
        with self.gated.evaluated_with(gate, part):
            difference, why = self._outcome(expected, run=run)
        return "" if difference <= (TOLERANCE if keep is None else 10 * TOLERANCE) else why

    def _is_stale(self, part: list[int]) -> bool:
        """Whether the outputs with blocks closed are right for the inputs of the pass before."""
        if self.run is self.example:
            return False
        with self.gated.original(part), torch.no_grad():
            expected = tensors_in(self.example())
        self.run_before()
        with self.gated.evaluated_with(CLOSED, part):
            return self._outcome(expected, run=self.example)[0] <= TOLERANCE

    def _wrong_without_hooks(self, part: list[int], gradients: bool) -> str:
        with self.gated.original(part), torch.no_grad():
            expected = tensors_in(self.run())
        with self.gated.evaluated_with(CLOSED, part), _fast_path():
            difference, why = self._outcome(expected, gradients)
        return "" if difference <= 10 * TOLERANCE else why

    def _raise_for_smallest(
        self,
        numbers: list[int],
        why: str,
        wrong: Callable[[list[int]], str],
        when: str,
        *,
        closed: bool = False,
    ) -> NoReturn:
        """Raise `UnsupportedBlockError` for the smallest set that a bisection finds to be wrong.

        Args:
            numbers: the blocks of a set that is wrong.
            why: what is wrong with it.
            wrong: returns what is wrong with a part of the set; empty if nothing is.
            when: the state of the blocks in which they are wrong.
            closed: whether that state is closed.
        """
        culprits, why = smallest(numbers, why, wrong)
        names = [self.found[n].name for n in culprits]
        first = self.found[culprits[0]]
        if changes := [self.found[n].change for n in culprits if self.found[n].change]:
            why += f": {changes[0]}"
        elif closed and self._is_stale(culprits):
            why += f": {STALE}"
        reason = f"with {' and '.join(map(repr, names[:3]))} {when} {why}{self._remark()}"
        raise unsupported(first.name, first.module, reason, names[1:])

    def _outcome(
        self,
        expected: Outputs,
        gradients: bool = False,
        run: Callable[..., Any] | None = None,
    ) -> tuple[float, str]:
        """The largest difference from `expected`, relative to its largest value; and a sentence."""
        try:
            with torch.set_grad_enabled(gradients):
                outputs = tensors_in((run or self.run)())
        except AdditionNotReachedError:
            return math.inf, BRANCH_NOT_SEEN
        except Exception as error:
            return math.inf, f"the model fails: {type(error).__name__}: {error}"
        if [x.shape for x in outputs] != [x.shape for x in expected]:
            return math.inf, "the model returns tensors of different shapes"
        difference = largest_difference(expected, outputs)
        return difference, (
            f"the output differs from the original's by {difference:.2g} of its largest value "
            "where it should not"
        )

    def _remark(self) -> str:
        return REMEMBERS if self.remembers else unsteady(self.gated.model, self.run)


STALE = (
    "something is computed from what its branch left on an object in an earlier pass, a mask for "
    "example, because a closed branch leaves nothing: compute it outside of the branch"
)
REMEMBERS = (
    " (the model itself gives different outputs when it is called again with the same input: it "
    "keeps a state from call to call, which a closed branch does not update)"
)


def remembering(model: nn.Module, run: Callable[..., Any]) -> str:
    """As `unsteady`, also with the same random numbers."""
    with preserve_state(model), ungated(model), torch.no_grad():
        outputs, again = (tensors_in(run(0)) for _ in range(2))
    return "" if _equal(outputs, again) else REMEMBERS


def unsteady(model: nn.Module, run: Callable[..., Any]) -> str:
    """Why the original model returns different outputs for the same input; empty if it does not."""
    with preserve_state(model), ungated(model), torch.no_grad():
        outputs, again, other = (tensors_in(run(seed)) for seed in (0, 0, 1))
    if not _equal(outputs, again):
        return REMEMBERS
    if not _equal(outputs, other):
        mode = "training mode" if model.training else "evaluation"
        return (
            f" (the model itself draws random numbers in {mode}; a closed branch draws none, so "
            "that later layers draw different ones)"
        )
    return ""


@contextmanager
def _fast_path() -> Iterator[None]:
    """While entered, PyTorch's transformer layers use their fused path, as in ordinary use."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(True)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _equal(one: Outputs, other: Outputs) -> bool:
    shapes = [x.shape for x in one] == [x.shape for x in other]
    return shapes and largest_difference(one, other) == 0
