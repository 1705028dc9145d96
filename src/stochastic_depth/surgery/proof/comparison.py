"""Compare a model with gates with its original, and name the block that is wrong if they differ."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd as Dropout

from stochastic_depth.errors import AdditionNotReachedError, GateError, UnsupportedBlockError
from stochastic_depth.gates import CLOSED, OPEN, Gate
from stochastic_depth.plain_text import count_text
from stochastic_depth.residual import Residual
from stochastic_depth.surgery.blocks import FoundBlock, unsupported
from stochastic_depth.surgery.edits import BRANCH_NOT_SEEN
from stochastic_depth.surgery.install import ungated
from stochastic_depth.surgery.model_state import next_random_numbers, preserve_state
from stochastic_depth.surgery.proof.gated import Gated
from stochastic_depth.tensors import largest_difference, tensors_in

TOLERANCE = 1e-5
"""The largest accepted difference with closed blocks, relative to the largest output. The outputs
may differ a little, because sums may be computed in a different order."""

HALF = 0.5
TIMES_HALF = Gate(factor=torch.full((), HALF, dtype=torch.float64, device="cpu"))
"""The branch is multiplied by 0.5, which floating-point numbers of every type are exactly."""


@dataclass(frozen=True)
class Trial:
    """One comparison with the original: a gate at some blocks, while all others are open."""

    blocks: list[int]
    gate: Gate
    state: str
    """The state of the blocks under the gate, as errors call it."""
    hint: str = ""
    """A cause that is likely if outputs differ, and the remedy."""
    keep: Tensor | None = None
    """bool [batch], the samples for which the gate is open; None for all or none."""
    factor: float = 0.0
    """What the gate multiplies the branches by; 0 if it is closed."""
    unchanged: bool = False
    """Whether the gate changes nothing."""
    gradients: bool = False
    """Whether gradients are compared too."""
    tolerance: float = TOLERANCE
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    """A context in which the model with gates runs, and the original does not."""


def trials(gated: Gated) -> Iterator[Trial]:
    """The comparisons to make in the mode in which the model is."""
    sets: list[list[int]] = []
    # A checkpoint recomputes deferred additions at places that the original does not recognise.
    deferred = any(unit.occurrences for block in gated.found for unit in block.units)
    for closed in gated.sets():
        gradients = gated.model.training and not sets and not deferred
        yield Trial(closed, CLOSED, "closed", gradients=gradients)
        sets.append(closed)
    scaled = [n for n, b in enumerate(gated.found) if not isinstance(b.module, Residual)]
    if scaled:
        registered = any(gated.found[n].is_registered for n in scaled)
        hint = GATE_SCALE if registered else MORE_IS_MULTIPLIED
        yield Trial(scaled, TIMES_HALF, f"multiplied by {HALF}", hint, factor=HALF)
    if gated.model.training:
        fully = gated.fully_open()
        yield Trial(gated.everything, fully, "open", unchanged=True, gradients=True)
        only = [n for n, block in enumerate(gated.found) if block.training_only]
        sets = [only] if only else []
    if gated.batch is not None:
        half, keep = gated.half(gated.batch)
        state, hint = "open for half of the samples", FEWER_SAMPLES if gated.model.training else ""
        for blocks in sets:
            yield Trial(blocks, half, state, hint, keep=keep, tolerance=10 * TOLERANCE)


GATE_SCALE = "a registered function must use gate.scale, once"
MORE_IS_MULTIPLIED = (
    "if more than the branch is multiplied, write the addition and what follows it as two "
    "statements of the forward method"
)
FEWER_SAMPLES = "a BatchNorm in its branch, for example, then sees fewer samples"
STALE = (
    "something is computed from what its branch left on an object in an earlier pass, a mask for "
    "example, because a closed branch leaves nothing: compute it outside of the branch"
)


class Results(NamedTuple):
    """What is compared of one pass."""

    outputs: list[Tensor]
    gradients: Mapping[str, Tensor] | None = None
    """Those of a random sum of the outputs, by parameter; None if they are not compared."""


class Comparison:
    """Compares a model with its original, in the mode in which the model is.

    In training mode the outputs of a model that keeps a state, or whose closed branches draw random
    numbers, differ in any case. They are not compared, unless there are blocks that run in training
    mode only.

    Args:
        restore: restores the state of the model in this mode. In training mode, in which a pass
            changes it, this is done after each pass.
    """

    def __init__(self, gated: Gated, restore: Callable[[], None]) -> None:
        self.gated, self.model, self.restore = gated, gated.model, restore
        self.training = gated.model.training
        self.excused = set[str]()
        """The states of blocks under which outputs differ in any case."""

    def check(self, trial: Trial, expected: Results | None = None) -> float:
        """Compare the outputs under a gate with those of the original.

        Args:
            expected: the results of the original, if they are known.

        Returns:
            The largest difference, relative to the largest output.

        Raises:
            UnsupportedBlockError: when they differ; the error names the block.
        """
        if trial.state in self.excused:
            return 0.0
        difference, why = self.difference(trial, trial.blocks, expected)
        if difference <= trial.tolerance:
            return difference
        excuse = self.why_nondeterministic(draws=self._draws_differently(trial))
        only = any(block.training_only for block in self.gated.found)
        if excuse and self.training and not only:
            self.excused.add(trial.state)
            return 0.0
        raise self._refusal(trial, why, excuse)

    def difference(
        self, trial: Trial, part: list[int], expected: Results | None = None
    ) -> tuple[float, str]:
        """How the outputs differ with the gate at the blocks `part`.

        Returns:
            The largest difference, relative to the largest output; and a sentence.
        """
        known = self.expected(trial, part) if expected is None else expected
        try:
            with torch.no_grad(), self.gated.with_gate(trial.gate, part), trial.around():
                found = self._run(trial)
        except AdditionNotReachedError:
            return math.inf, BRANCH_NOT_SEEN
        except GateError as error:
            return math.inf, f"the model fails: {error}"
        except Exception as error:
            return math.inf, f"the model fails: {type(error).__name__}: {error}"
        if form := _different_forms(known.outputs, found.outputs):
            return math.inf, f"the model returns {form}"
        difference = largest_difference(known.outputs, found.outputs)
        rounding = 1 if trial.unchanged else 100  # sums may be computed in a different order
        wrong = _different(known.gradients, found.gradients, rounding)
        if wrong and self._gradients_vary(trial, part, rounding):
            wrong = ""
        if wrong and difference <= trial.tolerance:
            return math.inf, f"the gradient of {wrong!r} is not that of the original"
        return difference, (
            f"the output differs from the original's by {difference:.2g} of its largest value "
            "where it should not"
        )

    def expected(self, trial: Trial, part: list[int]) -> Results:
        """The results of the original.

        If they are for other inputs than the example and blocks are to be closed, a pass on the
        example with all gates open follows, so that what branches leave on an object is that of the
        example.
        """
        bypassed = () if trial.unchanged else part
        with torch.no_grad(), self.gated.original(bypassed, trial.keep, trial.factor):
            expected = self._run(trial)
        if self.gated.other is not self.gated.run and not trial.gate.open:
            with torch.no_grad(), self.gated.with_gate(OPEN):
                self.gated.run()
        return expected

    def _gradients_vary(self, trial: Trial, part: list[int], rounding: float) -> bool:
        """Whether the gradients of the original itself differ from pass to pass, as atomic sums on
        a GPU do; a tenth of what would be accepted is enough."""
        first, again = self.expected(trial, part), self.expected(trial, part)
        return bool(_different(first.gradients, again.gradients, rounding / 10))

    def why_nondeterministic(self, draws: bool) -> str:
        """Why the original returns different outputs for the same input; empty if it does not.

        Args:
            draws: whether other random numbers count as a reason.
        """
        self.restore()
        with preserve_state(self.model), ungated(self.model), torch.no_grad():
            first, again, other = (tensors_in(self.gated.run(seed)) for seed in (0, 0, int(draws)))
        if largest_difference(first, again):
            return REMEMBERS
        mode = "training mode" if self.training else "evaluation"
        return DRAWS.format(mode) if largest_difference(first, other) else ""

    def _draws_differently(self, trial: Trial) -> bool:
        """Whether the model draws other random numbers than its original, as if a closed branch
        does not draw those that the original draws there."""
        drawn = []
        for gates in (
            self.gated.original(() if trial.unchanged else trial.blocks, trial.keep, trial.factor),
            self.gated.with_gate(trial.gate, trial.blocks),
        ):
            try:
                with torch.no_grad(), gates:
                    self._run(trial)
            except Exception:
                return False
            drawn.append(next_random_numbers(self.model))
        return drawn[0] != drawn[1]

    def _run(self, trial: Trial) -> Results:
        try:
            if trial.gradients:
                with torch.enable_grad():
                    return _step(self.model, self.gated.other)
            return Results(tensors_in(self.gated.other()))
        finally:
            if self.training:
                self.restore()

    def _refusal(self, trial: Trial, why: str, excuse: str) -> UnsupportedBlockError:
        """The error for the smallest part of the blocks that a bisection finds to be wrong.

        Args:
            why: what is wrong with all of them.
            excuse: why the original itself may differ from call to call; empty if it does not.
        """

        def wrong(part: list[int]) -> str:
            difference, sentence = self.difference(trial, part)
            return "" if difference <= trial.tolerance else sentence

        culprits, why = smallest(trial.blocks, why, wrong)
        blocks = [self.gated.found[n] for n in culprits]
        names = [block.name for block in blocks]
        changes = [change for block in blocks if (change := self._change_in_place(block))]
        if hint := changes[0] if changes else self._hint(trial, culprits):
            why += f": {hint}"
        mode = "in training mode, " if self.training else ""
        reason = f"{mode}with {' and '.join(map(repr, names[:3]))} {trial.state} {why}{excuse}"
        return unsupported(names[0], blocks[0].module, reason, names[1:])

    def _hint(self, trial: Trial, culprits: list[int]) -> str:
        if trial.gate.open or self.gated.other is self.gated.run:
            return trial.hint
        on_example = Comparison(replace(self.gated, other=self.gated.run), self.restore)
        difference, _ = on_example.difference(trial, culprits)
        return STALE if difference <= trial.tolerance else trial.hint

    def _change_in_place(self, block: FoundBlock) -> str:
        """How the branch of `block` may change its shortcut in place; empty if it cannot."""
        if block.in_place_problem or not self.training:
            return block.in_place_problem
        for name, module in block.module.named_modules(prefix=block.name):
            if isinstance(module, Dropout) and module.inplace:
                return (
                    f"dropout works in place in {name!r}, which a closed block does not run: give "
                    "it inplace=False, or write x + f(x.clone())"
                )
        return ""


REMEMBERS = (
    " (the model itself gives different outputs when it is called again with the same input: it "
    "keeps a state from call to call, which a closed branch does not update)"
)
DRAWS = (
    " (the model itself draws random numbers in {}; a closed branch draws none, so that later "
    "layers draw different ones)"
)

PROMOTES = (
    "its branch has another dtype than its shortcut, as under autocast: call sd.apply under the "
    "autocast in which you train, or cast the branch to the dtype of its input, f(x).to(x.dtype)"
)
COLLECTS = (
    "if it collects a value of each block, such as its router logits or its auxiliary loss, turn "
    "that off"
)


def smallest(
    numbers: list[int], why: str, wrong: Callable[[list[int]], str]
) -> tuple[list[int], str]:
    """The smallest set of blocks that a bisection finds to be wrong, and what is wrong with it.

    Args:
        why: what is wrong with all of `numbers`.
        wrong: returns what is wrong with a part of them; empty if nothing is.
    """
    middle = len(numbers) // 2
    for part in (numbers[:middle], numbers[middle:]):
        if part and len(part) < len(numbers) and (found := wrong(part)):
            return smallest(part, found, wrong)
    return numbers, why


def _step(model: nn.Module, run: Callable[..., Any]) -> Results:
    """The outputs of a training step, and the gradients of a random sum of them, by parameter.

    The gradients are None where the backward pass fails.
    """
    outputs = tensors_in(run())
    source = torch.Generator("cpu").manual_seed(0)
    terms = []
    for out in outputs:
        if out.requires_grad and (out.is_floating_point() or out.is_complex()):
            weights = torch.randn(out.shape, generator=source, device="cpu")
            terms.append((out.abs() if out.is_complex() else out).mul(weights.to(out.device)).sum())
    try:
        if terms:
            # Not as a method, which would run outside of the modes that change what is recomputed.
            torch.autograd.backward(torch.stack([term.float() for term in terms]).sum())
        held = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients = {name: gradient.to_dense() for name, gradient in held.items()}
    except GateError:  # which says more than that gradients differ
        raise
    except Exception:  # the training steps of `check_training` report it
        gradients = None
    for parameter in model.parameters():
        parameter.grad = None
    return Results(outputs, gradients)


def _different_forms(expected: Sequence[Tensor], found: Sequence[Tensor]) -> str:
    """How the numbers, shapes or dtypes of tensors differ, and a remedy; empty if they do not."""
    if len(expected) != len(found):
        number = count_text(len(found), "tensor")
        return f"{number}, and its original {len(expected)}: {COLLECTS}"
    for known, new in zip(expected, found, strict=True):
        if known.shape != new.shape:
            shapes = f"a tensor of shape {list(new.shape)}, and its original {list(known.shape)}"
            return f"{shapes}: {COLLECTS}"
        if known.dtype != new.dtype:
            return f"a tensor of {new.dtype}, and its original {known.dtype}: {PROMOTES}"
    return ""


def _different(
    expected: Mapping[str, Tensor] | None, found: Mapping[str, Tensor] | None, rounding: float
) -> str:
    """The name of a parameter whose gradients differ; empty if all are the same, or not known.

    Args:
        rounding: how many times as large the accepted differences are as for the same operations.
    """
    if not expected or found is None:
        return ""
    largest = max(map(_largest, expected.values()))
    for name in dict.fromkeys((*expected, *found)):
        known = expected.get(name, found.get(name))
        assert known is not None
        one, other = (
            gradients.get(name, torch.zeros_like(known)) for gradients in (expected, found)
        )
        if known.numel() and not torch.equal(one, other):
            epsilon = torch.finfo(known.dtype).eps
            accepted = rounding * max(100 * epsilon * _largest(one), 10 * epsilon * largest)
            same = (one == other) | (one.isnan() & other.isnan())
            apart = (one - other).abs().masked_fill(same, 0)
            if not apart.max().item() <= accepted:
                return name
    return ""


def _largest(gradient: Tensor) -> float:
    """The largest finite magnitude in a gradient."""
    finite = gradient.abs()[gradient.isfinite()]
    return finite.max().item() if finite.numel() else 0.0
