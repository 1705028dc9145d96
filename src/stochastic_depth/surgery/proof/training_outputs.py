"""Compare outputs and gradients with those of the original, in training mode."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd as Dropout
from torch.overrides import TorchFunctionMode

from stochastic_depth.block import Block
from stochastic_depth.choices import Scale
from stochastic_depth.errors import GateError
from stochastic_depth.gates import CLOSED, OPEN, Gate, GateKind
from stochastic_depth.surgery.blocks import FoundBlock, unsupported
from stochastic_depth.surgery.example import preserve_state
from stochastic_depth.surgery.install import ungated
from stochastic_depth.surgery.proof.call_counts import in_training
from stochastic_depth.surgery.proof.evaluation import (
    TOLERANCE,
    closed_sets,
    half_gate,
    smallest,
    unsteady,
)
from stochastic_depth.surgery.proof.reference import bypassed
from stochastic_depth.tensors import largest_difference, tensors_in


def compare_training(
    model: nn.Module,
    run: Callable[..., Any],
    found: Sequence[FoundBlock],
    blocks: Sequence[Block],
    batch: int | None,
    kind: GateKind,
    scale: Scale,
) -> None:
    """Compare the model, in training mode, with the original in which additions are bypassed.

    With all gates open, in the form that training draws them, gradients are compared too. Dropout
    is disabled in both, because a closed branch draws no random numbers. The outputs of a model
    that draws further random numbers, or keeps a state, differ in any case and are not
    compared.

    Raises:
        UnsupportedBlockError: when outputs or gradients differ.
    """

    def wrong(part: list[int], gate: Gate = CLOSED, keep: Tensor | None = None) -> str:
        gates = [gate if n in part else OPEN for n in range(len(blocks))]
        closed = [found[n] for n in part]
        with preserve_state(model), torch.no_grad(), in_training(blocks, gates):
            outputs = tensors_in(run())
        with preserve_state(model), torch.no_grad(), ungated(model), bypassed(closed, keep):
            expected = tensors_in(run())
        if largest_difference(expected, outputs) <= TOLERANCE:
            return ""
        return (
            "in training mode, with it closed, the output differs from that of the original whose "
            "addition returns its shortcut"
            if keep is None
            else "in training mode, with it open for half of the samples, the output differs from "
            "that of the original; a BatchNorm in its branch, for example, then sees fewer samples"
        )

    def wrong_though_open(part: list[int]) -> str:
        gates = [fully_open if n in part else OPEN for n in range(len(blocks))]
        try:
            with preserve_state(model), in_training(blocks, gates):
                outputs, gradients = _step(model, run)
        except GateError as error:
            return f"in training mode {error}"
        with preserve_state(model), ungated(model):
            expected, expected_gradients = _step(model, run)
        same = largest_difference(expected, outputs) <= TOLERANCE
        if differs := _different(expected_gradients, gradients) if same else "output":
            return (
                f"in training mode, with its gate open, the {differs} is not that of the original: "
                "where a value of its branch goes through an autograd.Function, which reentrant "
                "checkpointing is, write the addition in the forward method of the block, or give "
                "checkpoint use_reentrant=False"
            )
        return ""

    only = [n for n, block in enumerate(found) if block.training_only]
    trials: list[tuple[list[int], Callable[[list[int]], str]]]
    trials = [(closed, wrong) for closed in _closed_in_training(found, only)]
    fully_open = _fully_open(kind, scale, batch)
    if not fully_open.is_plain:
        everything = list(range(len(found)))
        trials.append((everything, wrong_though_open))
    if only and batch is not None:
        half, keep = half_gate(batch, kind)
        trials.append((only, functools.partial(wrong, gate=half, keep=keep)))
    with _SteadyDropout(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # checkpoints warn of inputs without gradients
        for part, is_wrong in trials:
            why = is_wrong(part)
            if not why:
                continue
            random = unsteady(model, run)
            if random and not only:
                return
            culprits, why = smallest(part, why, is_wrong)
            first, *others = (found[n] for n in culprits)
            names = [block.name for block in others]
            changes = [text for n in culprits if (text := _change_in_place(found[n]))]
            why = ": ".join([why, *changes[:1]])
            raise unsupported(first.name, first.module, why + random, names)


def _fully_open(kind: GateKind, scale: Scale, batch: int | None) -> Gate:
    """A gate of the form that training steps draw, which changes nothing."""
    factor = torch.ones((), dtype=torch.float64, device="cpu") if scale == "training" else None
    if batch is None or kind == "batch":
        return Gate(factor=factor)
    if kind == "sample":
        return Gate(factor=factor, keep=torch.ones(batch, dtype=torch.bool), batch=batch)
    return Gate(factor=factor, samples=torch.arange(batch, device="cpu"), batch=batch)


def _step(model: nn.Module, run: Callable[..., Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The outputs of a training step, and the gradients of a random sum of them, by parameter.

    There are no gradients where the backward pass fails.
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
            torch.stack([term.float() for term in terms]).sum().backward()
        held = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients = {name: gradient.to_dense() for name, gradient in held.items()}
    except Exception:  # `_why_not_trained` reports it
        gradients = {}
    for parameter in model.parameters():
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


def _closed_in_training(found: Sequence[FoundBlock], only: Sequence[int]) -> list[list[int]]:
    """Sets of blocks to close: all blocks, and sets that separate the blocks of `only`.

    Args:
        only: the blocks that run in training mode only; the others were separated in evaluation.
    """
    parts = [[only[n] for n in sorted(part)] for part in closed_sets(len(only))] if only else []
    return [list(range(len(found))), *(part for part in parts if len(part) < len(found))]


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
