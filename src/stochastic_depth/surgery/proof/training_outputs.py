"""Compare outputs and gradients with those of the original, in training mode."""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd as Dropout
from torch.overrides import TorchFunctionMode

from stochastic_depth.errors import GateError
from stochastic_depth.gates import CLOSED, OPEN, Gate
from stochastic_depth.residual import Residual
from stochastic_depth.surgery.blocks import FoundBlock, unsupported
from stochastic_depth.surgery.example import preserve_state
from stochastic_depth.surgery.proof.evaluation import STALE, TOLERANCE, remembering, unsteady
from stochastic_depth.surgery.proof.gated import HALF, TIMES_HALF, Gated, closed_sets, smallest
from stochastic_depth.tensors import largest_difference, tensors_in

Run = Callable[..., Any]
Restore = Callable[[], None]
Excuse = Callable[[nn.Module, Run], str]


class Trial(NamedTuple):
    """One comparison of the model with the original."""

    blocks: list[int]
    wrong: Callable[[list[int]], str]
    """Returns what is wrong with a part of the blocks; empty if nothing is."""
    excuse: Excuse
    """Returns why outputs differ although nothing is wrong; empty if there is no such reason."""


def compare_training(gated: Gated) -> None:
    """Compare the model, in training mode, with the original in which additions are bypassed.

    With all gates open, in the form that training draws them, gradients are compared too. Dropout
    is disabled in both, because a closed branch draws no random numbers. The outputs of a model
    that draws further random numbers, or keeps a state, differ in any case and are not
    compared; with open gates both draw the same numbers, from the same seed.

    Raises:
        UnsupportedBlockError: when outputs or gradients differ.
    """
    only = [n for n, block in enumerate(gated.found) if block.training_only]
    excused = set[Excuse]()
    with (
        preserve_state(gated.model) as restore,
        _SteadyDropout(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # checkpoints warn of inputs without gradients
        for trial in _trials(gated, only, restore):
            why = "" if trial.excuse in excused else trial.wrong(trial.blocks)
            if not why:
                continue
            excuse = trial.excuse(gated.model, gated.step)
            if excuse and not only:
                excused.add(trial.excuse)
                continue
            culprits, why = smallest(trial.blocks, why, trial.wrong)
            first, *others = (gated.found[n] for n in culprits)
            names = [block.name for block in others]
            changes = [text for n in culprits if (text := _change_in_place(gated.found[n]))]
            why = ": ".join([why, *changes[:1]])
            raise unsupported(first.name, first.module, why + excuse, names)


def _trials(gated: Gated, only: list[int], restore: Restore) -> Iterator[Trial]:
    """What is compared.

    Args:
        only: the blocks that run in training mode only.
        restore: restores the state of the model; it is called after each pass.
    """
    for closed in closed_sets(len(gated.found)):
        yield Trial(sorted(closed), functools.partial(_wrong_closed, gated, restore), unsteady)
    scaled = [n for n, b in enumerate(gated.found) if not isinstance(b.module, Residual)]
    yield Trial(scaled, functools.partial(_wrong_scaled, gated, restore), unsteady)
    if not gated.fully_open().is_plain:
        wrong = functools.partial(_wrong_though_open, gated, restore)
        yield Trial(gated.everything, wrong, remembering)
    if only and gated.batch is not None:
        half, keep = gated.half(gated.batch)
        yield Trial(only, functools.partial(_wrong_for_half, gated, restore, half, keep), unsteady)


def _wrong_closed(gated: Gated, restore: Restore, part: list[int]) -> str:
    """How outputs differ from the original's with the blocks `part` closed; empty if not at all."""
    if _same(gated, restore, gated.other_step, CLOSED, part):
        return ""
    why = (
        "in training mode, with it closed, the output differs from that of the original whose "
        "addition returns its shortcut"
    )
    stale = gated.other_step is not gated.step and _same(gated, restore, gated.step, CLOSED, part)
    return f"{why}: {STALE}" if stale else why


def _wrong_scaled(gated: Gated, restore: Restore, part: list[int]) -> str:
    """How outputs differ with the branches of `part` times 0.5; empty if not at all."""
    if _same(gated, restore, gated.step, TIMES_HALF, part, factor=HALF):
        return ""
    return (
        f"in training mode, with its branch multiplied by {HALF}, the output differs from that of "
        "the original, because more than the branch is multiplied: write the addition and what "
        "follows it as two statements of the forward method"
    )


def _wrong_for_half(
    gated: Gated, restore: Restore, gate: Gate, keep: Tensor, part: list[int]
) -> str:
    """How outputs differ with `gate`, which is open for the samples `keep`; empty if not at all."""
    if _same(gated, restore, gated.step, gate, part, keep):
        return ""
    return (
        "in training mode, with it open for half of the samples, the output differs from "
        "that of the original; a BatchNorm in its branch, for example, then sees fewer samples"
    )


def _same(
    gated: Gated,
    restore: Restore,
    run: Run,
    gate: Gate,
    part: list[int],
    keep: Tensor | None = None,
    factor: float = 0.0,
) -> bool:
    """Whether the outputs of `run` with `gate` at the blocks `part` are those of the original.

    If `run` has other inputs than the example, a pass on the example with all gates open comes
    before, so that what branches leave on an object is that of the example.

    Args:
        keep: bool [batch], the samples for which `gate` is open; None if it is closed for all.
        factor: what `gate` multiplies the branches by; 0 if it is closed.
    """
    with torch.no_grad():
        if run is not gated.step:
            with gated.trained_with(OPEN, ()):
                gated.step()
        with gated.trained_with(gate, part):
            outputs = tensors_in(run())
        restore()
        with gated.original(part, keep, factor):
            expected = tensors_in(run())
        restore()
    return largest_difference(expected, outputs) <= TOLERANCE


def _wrong_though_open(gated: Gated, restore: Restore, part: list[int]) -> str:
    """How outputs or gradients differ from the original's with open gates; empty if not at all."""
    try:
        with gated.trained_with(gated.fully_open(), part):
            outputs, gradients = _step(gated)
    except GateError as error:
        return f"in training mode {error}"
    finally:
        restore()
    with gated.original():
        expected, expected_gradients = _step(gated)
    restore()
    same = largest_difference(expected, outputs) <= TOLERANCE
    if differs := _different(expected_gradients, gradients) if same else "output":
        return (
            f"in training mode, with its gate open, the {differs} is not that of the original: "
            "where a value of its branch goes through an autograd.Function, which reentrant "
            "checkpointing is, write the addition in the forward method of the block, or give "
            "checkpoint use_reentrant=False"
        )
    return ""


def _step(gated: Gated) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The outputs of a training step, and the gradients of a random sum of them, by parameter.

    There are no gradients where the backward pass fails.
    """
    outputs = tensors_in(gated.step())
    source = torch.Generator("cpu").manual_seed(0)
    terms = []
    for out in outputs:
        if out.requires_grad and (out.is_floating_point() or out.is_complex()):
            weights = torch.randn(out.shape, generator=source, device="cpu")
            terms.append((out.abs() if out.is_complex() else out).mul(weights.to(out.device)).sum())
    try:
        if terms:
            torch.stack([term.float() for term in terms]).sum().backward()
        held = {name: p.grad for name, p in gated.model.named_parameters() if p.grad is not None}
        gradients = {name: gradient.to_dense() for name, gradient in held.items()}
    except Exception:  # `_why_not_trained` reports it
        gradients = {}
    for parameter in gated.model.parameters():
        parameter.grad = None
    return outputs, gradients


def _different(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """The gradient that differs, as errors call it; empty if all are the same."""
    if not expected:
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
            accepted = max(100 * epsilon * _largest(one), 10 * epsilon * largest)
            same = (one == other) | (one.isnan() & other.isnan())
            apart = (one - other).abs().masked_fill(same, 0)
            if not apart.max().item() <= accepted:
                return f"gradient of {name!r}"
    return ""


def _largest(gradient: Tensor) -> float:
    """The largest finite magnitude in a gradient."""
    finite = gradient.abs()[gradient.isfinite()]
    return finite.max().item() if finite.numel() else 0.0


def _change_in_place(block: FoundBlock) -> str:
    """How the branch of `block` may change its shortcut in place; empty if it cannot."""
    inside = block.module.named_modules(prefix=block.name)
    drops = [name for name, module in inside if isinstance(module, Dropout) and module.inplace]
    return block.change or (
        f"dropout works in place in {drops[0]!r}, which a closed block does not run: give it "
        "inplace=False, or write x + f(x.clone())"
        if drops
        else ""
    )


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
