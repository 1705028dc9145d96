"""The proof for gates of single samples: which dimension, and which tensors, hold the batch."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.block import Block, force
from stochastic_depth.errors import (
    AdditionNotReachedError,
    ApplyError,
    StochasticDepthError,
    UnsupportedBlockError,
    first_line,
)
from stochastic_depth.gates import Gate
from stochastic_depth.hooks import batch_size
from stochastic_depth.surgery.blocks import FoundBlock, unsupported
from stochastic_depth.surgery.edits import BRANCH_NOT_SEEN
from stochastic_depth.surgery.example import Example, caller
from stochastic_depth.surgery.model_state import preserve_state
from stochastic_depth.surgery.proof.reference import bypassed
from stochastic_depth.surgery.rewrite.select_samples import HOLDS_SAMPLES, SeenShapes, record_shapes
from stochastic_depth.tensors import largest_difference, tensors_in
from stochastic_depth.torch_private import tree_leaves, tree_map

REMEDY = 'use gate="batch", or put the batch first'


def check_samples(
    model: nn.Module, example: Example, found: Sequence[FoundBlock], batch: int
) -> Example:
    """Prove that the first dimension of the inputs is the batch.

    Half of the samples, in a different order, must have the same outputs as among all samples. Half
    of the time steps would have different ones, whether a model looks back in time or ahead.

    Returns:
        The example with half of the samples.

    Raises:
        ApplyError: when the outputs differ, or the example has fewer than two samples.
    """
    _require_two_samples(batch)
    half = half_of(batch)
    with preserve_state(model), torch.no_grad():
        model.eval()
        with bypassed(found, torch.ones(batch, dtype=torch.bool, device="cpu")):
            whole = tensors_in(caller(model, example)())
        failure: ApplyError | None = None
        for part in halves(example, batch):
            try:
                with bypassed(found, torch.ones(half, dtype=torch.bool, device="cpu")):
                    outputs = tensors_in(caller(model, part)())
            except UnsupportedBlockError:
                raise
            except Exception as error:
                failure = failure or ApplyError(
                    "gates for single samples need the batch as the first dimension of all inputs: "
                    f"with {half} of {batch} samples {type(model).__name__} fails "
                    f"({type(error).__name__}: {error}); {REMEDY}"
                )
                continue
            if _are_among(outputs, whole, batch):
                return part
            failure = failure or ApplyError(
                f"{type(model).__name__}: running {half} of {batch} samples changes their outputs, "
                f"so the first dimension is not the batch (is it time?); {REMEDY}"
            )
    assert failure is not None
    raise failure


def _require_two_samples(batch: int) -> None:
    """Raise `ApplyError` unless an example has at least two samples."""
    if batch < 2:
        raise ApplyError(
            "gates for single samples need an example of at least two samples, to see that its "
            f"first dimension is the batch; this one has {batch}"
        )


def half_of(batch: int) -> int:
    return (batch + 1) // 2


def every_other(x: Tensor) -> Tensor:
    """Every other sample, beginning with the last: [batch, ...] -> [half, ...]."""
    return x.flip(0)[::2]


def halves(example: Example, batch: int) -> Iterator[Example]:
    """`example` with half of the samples, once for each guess about which tensors hold samples.

    The first tensor always does. Other tensors of the same length may be masks [time, time].

    Raises:
        ApplyError: when there are fewer than two samples.
    """
    _require_two_samples(batch)
    long = [x for x in tree_leaves(example) if isinstance(x, Tensor) and x.ndim]
    first, *others = [id(x) for x in long if len(x) == batch]
    for kept in range(len(others[:3]) + 1):
        for whole in itertools.combinations(others[:3], kept):
            cut = {first, *others} - set(whole)
            yield tree_map(lambda x, c=cut: every_other(x) if id(x) in c else x, example)


def _are_among(part: list[Tensor], whole: list[Tensor], batch: int) -> bool:
    """Whether the outputs `part`, of every other sample, agree with `whole`, of all samples."""

    def same_samples(x: Tensor, y: Tensor) -> Tensor:
        if x.shape == y.shape or not x.ndim or len(x) % batch:
            return x
        return every_other(x.unflatten(0, (batch, -1))).flatten(0, 1)

    if len(part) != len(whole):
        return False
    expected = [same_samples(x, y) for x, y in zip(whole, part, strict=True)]
    compared = [(x, y) for x, y in zip(expected, part, strict=True) if x.ndim and y.ndim]
    if any(x.shape != y.shape for x, y in compared):
        return False
    return not compared or largest_difference(*map(list, zip(*compared, strict=True))) <= 1e-3


def learn_samples(
    model: nn.Module,
    found: Sequence[FoundBlock],
    blocks: Sequence[Block],
    examples: tuple[Example, Example],
) -> None:
    """Record, in the modules, which of the tensors that enter a branch hold samples.

    Args:
        examples: the example with all samples, and the example with half of them.

    Raises:
        UnsupportedBlockError: when the batch is not the first dimension of a tensor that enters a
            branch, or when an addition is not reached.
    """
    batch = batch_size(examples[0])
    sizes = batch, half_of(batch)
    known: dict[nn.Module, dict[Any, bool]] = {}
    block_of = {m: block for block in found for unit in block.units for m, _ in unit.edits}
    with_callers = {m for b in found for u in b.units if len(u.edits) > 1 for m, _ in u.edits}
    for training in (False, True):
        try:
            seen = [
                _shapes(model, caller(model, each), blocks, size, training)
                for each, size in zip(examples, sizes, strict=True)
            ]
        except AdditionNotReachedError as error:
            block = next((block for block in found if block.name == error.block), found[0])
            raise unsupported(block.name, block.module, BRANCH_NOT_SEEN) from error
        except StochasticDepthError:
            raise
        except Exception as error:
            raise UnsupportedBlockError(
                f'with gate="subset" {type(model).__name__} fails ({type(error).__name__}: '
                f'{first_line(error)}): use gate="batch" for this model'
            ) from error
        for (module, key), shapes in seen[0].items():
            pairs = zip(shapes, seen[1].get((module, key), ()), strict=False)
            verdicts = {_verdict(one, other, sizes) for one, other in pairs}
            verdict = verdicts.pop() if len(verdicts) == 1 else None
            if verdicts or (verdict is None and module not in with_callers):
                block = block_of.get(module, found[0])
                why = (
                    f"a tensor of shape {list(shapes[0])} enters the branch, and its first "
                    f'dimension is not the batch ({batch}): use gate="batch" for this model'
                )
                raise unsupported(block.name, block.module, why)
            known.setdefault(module, {})[key] = bool(verdict)
    for module, keys in known.items():
        module.__dict__[HOLDS_SAMPLES] = keys


def _verdict(one: tuple[int, ...], other: tuple[int, ...], sizes: tuple[int, int]) -> bool | None:
    """Whether the first dimension of a tensor is the batch; None if it is a later dimension.

    Args:
        one: its shape with all samples.
        other: its shape with half of them.
        sizes: the numbers of samples.
    """
    if one == other:
        return False
    if one[:1] == sizes[:1] and other[:1] == sizes[1:] and one[1:] == other[1:]:
        return True
    return None


def _shapes(
    model: nn.Module,
    run: Callable[..., Any],
    blocks: Sequence[Block],
    batch: int,
    training: bool,
) -> Mapping[Any, Any]:
    """The shapes of tensors that enter branches; empty if the model cannot train on the example."""
    gate = Gate(samples=torch.arange(batch, device="cpu"), batch=batch)
    seen: SeenShapes = {}
    with preserve_state(model), torch.no_grad():
        model.train(training)
        try:
            with force(blocks, gate), record_shapes() as seen:
                run()
        except Exception:
            if not training:
                raise
            return {}
    return seen
