"""`sd.fold`: multiply p_l into the weights, so that the network becomes a plain model."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.block import Block, force
from stochastic_depth.errors import FoldError, first_line, is_out_of_memory
from stochastic_depth.export.exponents import Inexact, Trace, exponents
from stochastic_depth.gates import Gate
from stochastic_depth.surgery.applied import applied_to, handle_of, remove
from stochastic_depth.surgery.example import Example, caller
from stochastic_depth.surgery.model_state import preserve_state
from stochastic_depth.surgery.refuse import refuse_sharded
from stochastic_depth.tensors import copied, largest_difference, tensors_in
from stochastic_depth.torch_private import tree_map_only

TOLERANCE = 1e-12
"""Tolerance of the output of a branch in float64, relative to its largest value."""
SINGLE = 1e-5
"""The same if the model computes something in less than float64."""


def fold(model: nn.Module, example: Example) -> None:
    """Multiply p_l into the weights of every branch, and remove stochastic depth, in place.

    The result is a model of the original class with the original names, whose outputs in evaluation
    are those of `model`. The weights that change are the last ones of each branch: gain and bias of
    a normalisation, weight and bias of a convolution or linear layer, or a layer scale. They are
    found by recording a forward pass, and every branch is compared with its original in float64.
    With `scale="training"` there is nothing to multiply, and this is the same as `sd.remove`.

    Args:
        model: a model that `sd.apply` was called on.
        example: inputs of one forward call.

    Raises:
        ApplyError: when `sd.apply` was not called on `model`.
        FoldError: when a block cannot take p_l exactly, or does not run yet because its p_l is 0;
            names the block. `model` is then as it was before.

    Examples:
        >>> model = sd.models.CifarResNet(8).eval()
        >>> handle = sd.apply(model)
        >>> images = torch.randn(2, 3, 32, 32)
        >>> before = model(images)
        >>> sd.fold(model, images)
        >>> torch.testing.assert_close(model(images), before)
    """
    handle_of(model)
    refuse_sharded(model, "fold")
    multiply(model, multipliers(model, example))
    remove(model)


def multiply(model: nn.Module, by: Mapping[str, float]) -> None:
    """Multiply weights in place.

    Args:
        by: the multipliers, by name of the weight in the `state_dict`.
    """
    state = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, multiplier in by.items():
            state[name].mul_(multiplier)


def multipliers(
    model: nn.Module, example: Example, closed: Collection[int] = ()
) -> dict[str, float]:
    """The multiplier of each weight that has to be multiplied, by its name.

    They are checked on a copy in float64, or in the model's own types if it does not run in
    float64.

    Args:
        closed: positions of blocks whose branch does not run at all.

    Raises:
        FoldError: as `fold`.
    """
    blocks, found = handle_of(model).blocks, applied_to(model).found
    survival = [
        0.0 if n in closed else None if each.training_only else _factor(block)
        for n, (block, each) in enumerate(zip(blocks, found, strict=True))
    ]
    for number, p in enumerate(survival):
        if p == 0 and number not in closed:
            raise FoldError(
                f"block {blocks[number].name!r} does not run yet, its p_l is 0, but a plain model "
                "has no gates and would run it: sd.truncate(model, keep, example) without it, or "
                "train until its p_l is above 0"
            )
    if all(p in (None, 0, 1) for p in survival):
        return {}
    try:
        twin = copied(model)
        for buffer in twin.buffers():  # `.double()` alone would separate those that modules share
            buffer.data = _double(buffer.data)
        twin.double()
        run = caller(twin, tree_map_only(Tensor, _double, example))
        before, outputs = _traced(twin, run, survival)
    except RuntimeError as error:  # an operation that does not exist in float64, or mixed types
        if is_out_of_memory(error):
            raise
        twin = copied(model)
        run = caller(twin, example)
        before, outputs = _traced(twin, run, survival)
    result: dict[str, float] = {}
    taken: dict[str, Block] = {}
    calls: dict[tuple[nn.Module, float], list[int]] = {}  # blocks of one module share their branch
    for number, (block, p) in enumerate(zip(blocks, survival, strict=True)):
        if p is not None and p not in (0, 1):
            calls.setdefault((block.module, p), []).append(number)
    for (_, p), numbers in calls.items():
        block = blocks[numbers[0]]
        try:
            if not all(before.scaled[number] for number in numbers):
                raise Inexact("it does not run on the example")
            by_name = exponents([s for number in numbers for s in before.scaled[number]])
        except Inexact as reason:
            raise _inexact(model, block, reason) from reason
        result |= {name: p**e for name, e in by_name.items()}
        taken |= dict.fromkeys(by_name, block)
    multiply(twin, result)
    after, folded = _traced(twin, run, [p and 1.0 for p in survival])
    _require_same(model, (before, outputs), (after, folded))
    _require_lasting(model, twin, run, {n: taken[n] for n in result})
    return result


def _require_lasting(
    model: nn.Module, twin: nn.Module, run: Callable[[], Any], blocks: Mapping[str, Block]
) -> None:
    """Check that a training pass does not overwrite the buffers that were multiplied.

    It does so with the vectors of spectral normalisation, and with running means.

    Args:
        twin: the copy whose tensors were multiplied.
        blocks: for each of them, by name, the block for whose p_l it was.

    Raises:
        FoldError: when one is overwritten, or when that cannot be tried.
    """
    state = twin.state_dict(keep_vars=True)
    buffers = {n: state[n].clone() for n in blocks if not isinstance(state[n], nn.Parameter)}
    if not buffers:
        return
    first = blocks[next(iter(buffers))]
    with preserve_state(twin), torch.no_grad(), handle_of(twin).full_depth():
        twin.train()
        try:
            run()
        except Exception as error:
            raise FoldError(
                f"block {first.name!r} takes its p_l into a buffer, which training must not "
                f"overwrite, but the example fails in training mode ({first_line(error)}): give "
                "one that runs after model.train(), such as one with labels or with two samples"
            ) from error
        after = twin.state_dict(keep_vars=True)
        for name, buffer in buffers.items():
            if not torch.equal(after[name], buffer):
                why = f"it would change the buffer {name!r}, which training overwrites"
                raise _inexact(model, blocks[name], why)


def _require_same(
    model: nn.Module, before: tuple[Trace, list[Tensor]], after: tuple[Trace, list[Tensor]]
) -> None:
    """Compare the output of each branch, and of the model, before and after folding.

    Raises:
        FoldError: when one of them differs.
    """
    tolerance = SINGLE if before[0].single else TOLERANCE
    blocks = handle_of(model).blocks
    for block, old, new in zip(blocks, before[0].scaled, after[0].scaled, strict=True):
        difference = largest_difference([s.result for s in old], [s.result for s in new])
        if not difference <= tolerance:
            raise _inexact(model, block, f"its branch would differ by {difference:.2g}")
    difference = largest_difference(before[1], after[1])
    if not difference <= tolerance:
        raise FoldError(
            f"the output of {type(model).__name__} would differ by {difference:.2g} of its largest "
            "value, so nothing was folded: use the model as it is, with its gates"
        )


def _factor(block: Block) -> float | None:
    """p_l in evaluation without forced gates; None where training divides by p_l instead."""
    gate = block.gates[0].unforced or block.evaluation_gate
    if not gate.open:
        return 0.0  # it does not run yet
    return None if gate.factor is None else gate.factor.item()


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _traced(
    twin: nn.Module, run: Callable[[], Any], survival: Sequence[float | None]
) -> tuple[Trace, list[Tensor]]:
    """A forward pass in evaluation with these factors, recorded; and its outputs.

    Args:
        survival: the factor of each block. 0 closes the block; with None its branch is added
            unscaled.
    """
    factors = [torch.tensor(p or 0.0, dtype=torch.float64, device="cpu") for p in survival]
    gates = [
        Gate(p != 0, None if p is None else factor)
        for p, factor in zip(survival, factors, strict=True)
    ]
    forced = force(handle_of(twin).blocks, gates)
    with preserve_state(twin), torch.no_grad(), forced, Trace(twin.eval(), factors) as trace:
        outputs = run()
    return trace, tensors_in(outputs)


def _inexact(model: nn.Module, block: Block, why: object) -> FoldError:
    kind = type(model.get_submodule(block.name)).__name__
    return FoldError(
        f"block {block.name!r} ({kind}) cannot take its p_l into its weights exactly: {why}; "
        "end its branch in a linear layer, a convolution, a normalisation or a layer scale, or "
        'train with scale="training", which leaves nothing to fold'
    )
