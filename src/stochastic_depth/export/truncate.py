"""A shallower model: some blocks for good only their shortcut, the others with p_l folded in."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from stochastic_depth.errors import TruncateError
from stochastic_depth.export.fold import largest_difference, multipliers, multiply
from stochastic_depth.export.shallower import take_out
from stochastic_depth.gates import Gate
from stochastic_depth.residual import Residual
from stochastic_depth.surgery.apply import applied_to, remove
from stochastic_depth.surgery.discovery.recording import tensors_in
from stochastic_depth.surgery.find import Example, Found, caller
from stochastic_depth.surgery.preserve import preserve_state

TOLERANCE = 1e-4
"""Of outputs in the model's own precision, relative to their largest value."""


def truncate(
    model: nn.Module,
    keep: int | Sequence[int],
    example: Example,
    *,
    recalibrate: Iterable[Any] | None = None,
) -> None:
    """Take the other blocks out of `model`, fold p_l into those that stay, and leave it plain.

    A `Residual` unit becomes its shortcut and activation, so that the names of all other weights
    stay. A block of any other class must give its input when it is closed, and is taken out of its
    list; where the list is numbered those behind it move up, as in the same architecture built
    shallower, and a `config` of transformers says so. The outputs are held against those of `model`
    with the same blocks closed. What is left trains on, and takes `sd.apply` again.

    Args:
        model: one that `sd.apply` was given.
        keep: the first so many blocks of each stage (a stage begins where the shortcut projects,
            or with another list of blocks); or the positions of the blocks to keep, from 0.
        example: inputs of one forward call.
        recalibrate: batches, [batch, ...] or pairs that begin with it, from which the statistics of
            BatchNorm are taken anew (`torch.optim.swa_utils.update_bn`).

    Raises:
        ApplyError: when `model` is not one that `sd.apply` was given.
        TruncateError: when `keep` does not fit, or naming a block that cannot be taken out.
        FoldError: naming a block that cannot take its p_l. In each case `model` is as it was.
    """
    closed = _closed(applied_to(model).found, keep)
    weights = multipliers(model, example, closed)
    twin = copy.deepcopy(model)
    truth = _closed_outputs(twin, closed, example)
    _cut(twin, closed, weights)
    try:
        with preserve_state(twin), torch.no_grad():
            twin.eval()
            difference = largest_difference(truth, tensors_in(caller(twin, example)()))
    except Exception as error:
        raise TruncateError(
            f"without these blocks {type(model).__name__} fails ({type(error).__name__}: {error}): "
            "keep others"
        ) from error
    if not difference <= TOLERANCE:
        raise TruncateError(
            f"{type(model).__name__} without these blocks differs from itself with them closed by "
            f"{difference:.2g} of its largest output: keep others"
        )
    _cut(model, closed, weights)
    if recalibrate is not None:
        was_training = model.training
        update_bn(recalibrate, model, next(model.parameters()).device)
        model.train(was_training)


def stages(found: Sequence[Found]) -> list[list[int]]:
    """The positions of the blocks, stage by stage."""
    result: list[list[int]] = []
    before = None
    for number, block in enumerate(found):
        parent = block.name.rpartition(".")[0]
        if parent != before or "projection" in block.shortcut:
            result.append([])
        result[-1].append(number)
        before = parent
    return result


def _closed(found: Sequence[Found], keep: int | Sequence[int]) -> list[int]:
    """The positions of the blocks that are not kept."""
    if isinstance(keep, int):
        if keep < 1:
            raise TruncateError(f"keep={keep}: at least the first block of each stage is kept")
        keep = [number for stage in stages(found) for number in stage[:keep]]
    wrong = [number for number in keep if not 0 <= number < len(found)]
    if wrong or len(set(keep)) < len(keep):
        raise TruncateError(
            f"keep={list(keep)}: different positions, from 0 to {len(found) - 1}, are asked for"
        )
    return [number for number in range(len(found)) if number not in keep]


def _closed_outputs(twin: nn.Module, closed: Sequence[int], example: Example) -> list[Tensor]:
    """The outputs with these blocks closed; refuses those that then do more than nothing."""
    applied = applied_to(twin)
    handles = []
    for number in closed:
        for addition in applied.handle.blocks[number].gates:
            addition.evaluation = Gate(open=False)
        block = applied.found[number]
        if not isinstance(block.module, Residual):
            handles.append(block.module.register_forward_hook(_must_pass(block), with_kwargs=True))
    with preserve_state(twin), torch.no_grad():
        twin.eval()
        outputs = tensors_in(caller(twin, example)())
    for handle in handles:
        handle.remove()
    return outputs


def _must_pass(block: Found) -> Any:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        given, gives = tensors_in((args, kwargs)), tensors_in(output)
        if not given or not gives or not torch.equal(given[0], gives[0]):
            raise TruncateError(
                f"block {block.name!r} ({type(module).__name__}) gives more than its input when it "
                "is closed (it projects or normalises what passes by), so it cannot be taken out: "
                "keep it"
            )

    return hook


def _cut(model: nn.Module, closed: Sequence[int], weights: dict[str, float]) -> None:
    names = [applied_to(model).found[number].name for number in closed]
    multiply(model, weights)
    remove(model)
    take_out(model, names)
