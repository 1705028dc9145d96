"""`sd.truncate`: remove some blocks of a model, and fold p_l into those that stay."""

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from stochastic_depth.block import force
from stochastic_depth.errors import TruncateError
from stochastic_depth.export.configurations import check_configuration
from stochastic_depth.export.fold import multipliers, multiply
from stochastic_depth.export.remove_blocks import replace_by_shortcuts
from stochastic_depth.gates import Gate
from stochastic_depth.numbers import whole_number
from stochastic_depth.residual import Residual
from stochastic_depth.surgery.applied import applied_to, remove
from stochastic_depth.surgery.blocks import MODULE_CONTAINERS, FoundBlock, enclosing
from stochastic_depth.surgery.example import Example, caller
from stochastic_depth.surgery.model_state import preserve_state
from stochastic_depth.surgery.refuse import refuse_nested, refuse_sharded
from stochastic_depth.tensors import copied, largest_difference, tensors_in

TOLERANCE = 1e-4
"""Tolerance of outputs in the model's precision, relative to their largest value."""


def truncate(
    model: nn.Module,
    keep: int | Sequence[int],
    example: Example,
    *,
    recalibrate: Iterable[Any] | None = None,
) -> None:
    """Keep some blocks of `model`, remove all others, and fold p_l into those that stay, in place.

    A `Residual` unit is replaced by its shortcut and activation, so that the names of all other
    weights stay. A block of any other class must return its input when it is closed, and is removed
    from its list. In a numbered list the following blocks move up, as in the same architecture
    built with fewer layers, and the `config` of a transformers model is updated. Blocks in the
    branch of a removed block are removed with it, also if `keep` names them. The outputs are
    compared with those of `model` with the same blocks closed. The result can be trained further,
    and `sd.apply` can be called on it again.

    Args:
        model: a model that `sd.apply` was called on.
        keep: how many blocks of each stage to keep, counted from its first (a stage begins where
            the shortcut projects, or with another list of blocks); or the positions of the blocks
            to keep, from 0.
        example: inputs of one forward call.
        recalibrate: batches, [batch, ...] or pairs that begin with one, from which the BatchNorm
            statistics are measured again (`torch.optim.swa_utils.update_bn`).

    Raises:
        ApplyError: when `sd.apply` was not called on `model`.
        TruncateError: when `keep` does not fit, or a block cannot be removed, which the error
            names, or `recalibrate` gives no batch.
        FoldError: when a kept block cannot take its p_l, or does not run yet because it is 0; the
            block is named. In each case, and when `recalibrate` raises an error, `model` is as it
            was before.

    Examples:
        >>> model = sd.models.CifarResNet(20)
        >>> handle = sd.apply(model)
        >>> sd.truncate(model, 1, torch.randn(1, 3, 32, 32))  # the first block of each stage
        >>> len(sd.apply(model).blocks)
        3
    """
    found = applied_to(model).found
    closed = _closed(found, keep)
    _require_whole(found, closed)
    refuse_sharded(model, "truncate")
    refuse_nested(example)
    weights = multipliers(model, example, closed)
    twin = copied(model)
    truth = _closed_outputs(twin, closed, example)
    _edit(twin, closed, weights)
    try:
        with preserve_state(twin), torch.no_grad():
            twin.eval()
            difference = largest_difference(truth, tensors_in(caller(twin, example)()))
    except Exception as error:
        raise TruncateError(
            f"without these blocks {type(model).__name__} fails ({type(error).__name__}: {error}): "
            "keep other blocks"
        ) from error
    if not difference <= TOLERANCE:
        raise TruncateError(
            f"{type(model).__name__} without these blocks differs from itself with them closed by "
            f"{difference:.2g} of its largest output: keep other blocks"
        )
    check_configuration(twin, example)
    if recalibrate is not None:  # on the copy, because the batches of the caller may fail
        _recalibrate(twin, recalibrate)
    _edit(model, closed, weights)
    if recalibrate is not None:
        _copy_statistics(model, twin)


def _copy_statistics(model: nn.Module, measured: nn.Module) -> None:
    """Give each BatchNorm of `model` the statistics that it has in `measured`."""
    for module, other in zip(model.modules(), measured.modules(), strict=True):
        if isinstance(module, _BatchNorm):
            for buffer, statistic in zip(
                module.buffers(recurse=False), other.buffers(recurse=False), strict=True
            ):
                buffer.copy_(statistic)


def _recalibrate(model: nn.Module, batches: Iterable[Any]) -> None:
    """Measure the BatchNorm statistics again.

    Raises:
        TruncateError: when there is no batch.
    """
    batches = iter(batches)
    first = list(itertools.islice(batches, 1))
    if not first:
        raise TruncateError(
            "recalibrate gives no batch to measure BatchNorm statistics from: give a list or a "
            "loader; an iterator can be used once"
        )
    update_bn(itertools.chain(first, batches), model, next(model.parameters()).device)


def stages(found: Sequence[FoundBlock]) -> list[list[int]]:
    """The positions of the blocks, one list for each stage."""
    result: list[list[int]] = []
    before = None
    for number, block in enumerate(found):
        parent = block.name.rpartition(".")[0]
        if parent != before or "projection" in block.shortcut:
            result.append([])
        result[-1].append(number)
        before = parent
    return result


def _closed(found: Sequence[FoundBlock], keep: int | Sequence[int]) -> list[int]:
    """The positions of the blocks that are not kept."""
    count = whole_number(keep)
    if count is not None:
        if count < 1:
            raise TruncateError(f"keep={keep}: at least the first block of each stage is kept")
        kept = [number for stage in stages(found) for number in stage[:count]]
    else:
        kept = _positions(keep, len(found))
    around = enclosing(found)
    return [n for n in range(len(found)) if n not in kept or not set(around[n]) <= set(kept)]


def _positions(keep: object, blocks: int) -> list[int]:
    """The positions in `keep`, as integers.

    Raises:
        TruncateError: when it is something else than different positions.
    """
    as_list: Any = getattr(keep, "tolist", None)  # of a NumPy array, or a tensor
    keep = keep if as_list is None else as_list()
    given = list(keep) if isinstance(keep, Iterable) else [keep]
    positions = [whole_number(each) for each in given]
    right = [p for p in positions if p is not None and 0 <= p < blocks]
    if len(right) < len(given) or len(set(right)) < len(right):
        gates = bool(given) and all(isinstance(each, bool) for each in given)
        raise TruncateError(
            f"keep={given}{', which are gates' * gates}: give different positions, from 0 to "
            f"{blocks - 1}"
        )
    return right


def _require_whole(found: Sequence[FoundBlock], closed: Collection[int]) -> None:
    """Raise `TruncateError` if one unit of a module is removed, and another one stays."""
    for number in closed:
        module = found[number].module
        kept = [n for n, each in enumerate(found) if each.module is module and n not in closed]
        if kept and not isinstance(module, Residual):
            whole = [n for n, each in enumerate(found) if each.module is module]
            raise TruncateError(
                f"the blocks at the positions {whole} are all in {found[number].name!r} "
                f"({type(module).__name__}), which is removed as a whole: keep all of them, or none"
            )


def _closed_outputs(twin: nn.Module, closed: Sequence[int], example: Example) -> list[Tensor]:
    """The outputs with the blocks `closed` closed.

    Raises:
        TruncateError: when one of them computes something even when it is closed.
    """
    applied = applied_to(twin)
    handles = []
    around = enclosing(applied.found)
    for number in closed:
        block = applied.found[number]
        if not isinstance(block.module, Residual) and not set(around[number]) & set(closed):
            handles.append(block.module.register_forward_hook(_must_pass(block), with_kwargs=True))
    blocks = [applied.handle.blocks[number] for number in closed]
    with preserve_state(twin), torch.no_grad(), force(blocks, Gate(open=False)):
        twin.eval()
        outputs = tensors_in(caller(twin, example)())
    for handle in handles:
        handle.remove()
    return outputs


def _must_pass(block: FoundBlock) -> Any:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        given, gives = tensors_in((args, kwargs)), tensors_in(output)
        if not given or not gives or not torch.equal(given[0], gives[0]):
            raise TruncateError(
                f"block {block.name!r} ({type(module).__name__}) returns more than its input when "
                "it is closed (it projects or normalises its shortcut), so it cannot be removed: "
                "keep it"
            )

    return hook


def _edit(model: nn.Module, closed: Sequence[int], weights: dict[str, float]) -> None:
    found = applied_to(model).found
    used = {name for n, block in enumerate(found) if n not in closed for name in block.modules}
    around = enclosing(found)
    outermost = [number for number in closed if not set(around[number]) & set(closed)]
    names = [name for number in outermost for name in _removed_with(found[number], model, used)]
    multiply(model, weights)
    remove(model)
    replace_by_shortcuts(model, names)


def _removed_with(found: FoundBlock, model: nn.Module, used: Collection[str]) -> list[str]:
    """The block, and modules of its branch that are in other lists, such as norms beside layers."""
    beside = [
        name
        for name in found.modules
        if name not in used
        and not name.startswith(f"{found.name}.")
        and isinstance(model.get_submodule(name.rpartition(".")[0]), MODULE_CONTAINERS)
    ]
    outermost = [n for n in beside if not any(n.startswith(f"{other}.") for other in beside)]
    return list(dict.fromkeys([found.name, *outermost]))
