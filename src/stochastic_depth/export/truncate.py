"""`sd.drop_order` and `sd.truncate`: find the blocks that are needed least, and remove them."""

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from stochastic_depth.block import force
from stochastic_depth.errors import TruncateError, first_line
from stochastic_depth.export.fold import multipliers, multiply
from stochastic_depth.gates import Gate
from stochastic_depth.handle import Handle
from stochastic_depth.residual import Residual
from stochastic_depth.surgery.applied import applied_to, handle_of, remove
from stochastic_depth.surgery.blocks import CONTAINERS, FoundBlock
from stochastic_depth.surgery.example import Example, caller, preserve_state
from stochastic_depth.surgery.refuse import refuse_nested, refuse_sharded
from stochastic_depth.tensors import largest_difference, tensors_in


class ShortcutOnly(nn.Module):
    """A residual unit without its branch: act(shortcut(x))."""

    def __init__(self, unit: Residual) -> None:
        super().__init__()
        self.shortcut = unit.shortcut
        self.activation = unit.activation
        self._overwrites = unit._overwrites

    def forward(self, x: Tensor) -> Tensor:
        if self._overwrites:
            x = x.clone()  # the activation works in place, and x belongs to the caller
        out = x if self.shortcut is None else self.shortcut(x)
        return out if self.activation is None else self.activation(out)


def replace_by_shortcuts(model: nn.Module, names: Collection[str]) -> None:
    """Replace the named `Residual` units by their shortcuts, and remove other blocks, in place.

    Raises:
        TruncateError: when a block is the model itself.
    """
    lists: dict[str, list[str]] = {}
    for name in names:
        parent, _, child = name.rpartition(".")
        unit = model.get_submodule(name)
        if not name:
            raise TruncateError(
                f"{type(model).__name__} is itself a block: nothing would be left without it"
            )
        if isinstance(unit, Residual):
            setattr(model.get_submodule(parent), child, ShortcutOnly(unit))
        else:
            lists.setdefault(parent, []).append(child)
    for parent, children in lists.items():
        _remove(model, parent, children)


def _remove(model: nn.Module, name: str, children: Collection[str]) -> None:
    """Remove children of the module called `name`; in a list, the remaining ones move up."""
    parent: Any = model.get_submodule(name)
    before = list(parent._modules)
    numbered = before == [str(number) for number in range(len(before))]
    kept = [number for number in before if number not in children]
    modules = [parent._modules[number] for number in kept]
    parent._modules.clear()
    for number, (old, module) in enumerate(zip(kept, modules, strict=True)):
        parent._modules[str(number) if numbered else old] = module
    if numbered:
        _renumber(modules, [int(number) for number in kept])
        _update_configurations(model, name, len(before), [int(number) for number in kept])


def _renumber(modules: Iterable[nn.Module], kept: list[int]) -> None:
    """Update the positions that layers store."""
    for new, (old, layer) in enumerate(zip(kept, modules, strict=True)):
        for module in layer.modules():
            if getattr(module, "layer_idx", None) == old:
                module.layer_idx = new  # type: ignore[assignment]


def _update_configurations(model: nn.Module, name: str, before: int, kept: list[int]) -> None:
    """Update the configurations of transformers above the list `name`, from which `kept` remain.

    Args:
        before: the length of the list before.
    """
    path = name.split(".")
    for length in range(len(path) + 1):
        above: Any = model.get_submodule(".".join(path[:length]))
        config = getattr(above, "config", None)
        if hasattr(above, "save_pretrained") and config is not None:
            changed = copy.deepcopy(config)  # other models may have the same one
            _count_layers(changed, path, before, kept)
            for module in model.modules():
                if getattr(module, "config", None) is config:
                    module.config = changed


def _count_layers(config: Any, path: list[str], before: int, kept: list[int]) -> None:
    depths = getattr(config, "depths", None)
    stages = [int(part) for part in path if part.isdigit()]
    if isinstance(depths, list | tuple) and stages:
        config.depths = [len(kept) if n == stages[0] else depth for n, depth in enumerate(depths)]
        return
    both = bool(getattr(config, "is_encoder_decoder", False))
    for count in _COUNTS_OF_DECODERS if both and "decoder" in path else _COUNTS:
        if getattr(config, count, None) == before:
            setattr(config, count, len(kept))
    for setting, value in list(vars(config).items()):
        if setting in _LAYERS_BY_NUMBER and value is not None:
            setattr(config, setting, [kept.index(number) for number in value if number in kept])
        elif isinstance(value, list | tuple) and len(value) == before and not both:
            setattr(config, setting, [value[number] for number in kept])


SAME = 1e-6
"""Relative tolerance for outputs that the same operations compute from the same weights."""
_COUNTS = "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers"
_COUNTS_OF_DECODERS = "decoder_layers", "num_decoder_layers"
_LAYERS_BY_NUMBER = "mlp_only_layers", "moe_layers"


def check_configuration(twin: nn.Module, example: Example) -> None:
    """Build the transformers models inside `twin` from their configurations, as loading them does.

    Raises:
        TruncateError: when a configuration cannot describe what is left of its model.
    """
    pretrained = [
        (name, module)
        for name, module in twin.named_modules()
        if hasattr(module, "save_pretrained") and hasattr(module, "config")
    ]
    outermost = [
        (name, module)
        for name, module in pretrained
        if not any(name != n and (not n or name.startswith(f"{n}.")) for n, _ in pretrained)
    ]
    for name, module in outermost:
        try:
            with torch.random.fork_rng(devices=[]):
                built = type(module)(copy.deepcopy(module.config))
            built.load_state_dict(module.state_dict())
            built = built.to(next(module.parameters()))
            rebuilt = built
            if name:
                rebuilt = copy.deepcopy(twin)
                rebuilt.set_submodule(name, built)
            with preserve_state(rebuilt), preserve_state(twin), torch.no_grad():
                given = tensors_in(caller(twin.eval(), example)())
                difference = largest_difference(
                    given, tensors_in(caller(rebuilt.eval(), example)())
                )
            why = "" if difference <= SAME else f"its outputs differ by {difference:.2g}"
        except Exception as error:
            why = f"{type(error).__name__}: {first_line(error)}"
        if why:
            raise TruncateError(
                f"{type(module).__name__}: its config cannot describe which layers are left, so "
                f"saving and loading would change the network ({why}): keep other blocks, for "
                "example the first of each stage (keep=N)"
            )


@dataclass(frozen=True)
class Dropped:
    """One step of `drop_order`: a block that is closed from then on."""

    block: int
    """Position of the block, from 0."""
    loss: float
    """The loss without this block and all blocks that were dropped before."""
    evaluations: int
    """How often the loss was evaluated to choose this block."""


def drop_order(model: nn.Module, loss: Callable[[nn.Module], float]) -> Iterator[Dropped]:
    """Close the blocks of `model` one by one, each time the one whose closing costs least.

    The search is greedy. To choose the n-th of L blocks, the loss is evaluated L - n + 1 times; for
    all of them together, L (L + 1) / 2 times. The iterator may be stopped at any time. `model` is
    not changed.

    Args:
        model: a model that `sd.apply` was called on.
        loss: called with the model in evaluation mode with some of its blocks closed; returns its
            loss, for example over the validation images.

    Raises:
        ApplyError: when `sd.apply` was not called on `model`.

    Examples:
        >>> model = sd.models.CifarResNet(20)
        >>> handle = sd.apply(model)
        >>> images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
        >>> def loss(network):
        ...     return nn.functional.cross_entropy(network(images), labels).item()
        >>> order = itertools.islice(sd.drop_order(model, loss), 2)
        >>> first = [dropped.block for dropped in order]
        >>> sd.truncate(model, [block for block in range(9) if block not in first], images)
        >>> len(sd.apply(model).blocks)
        7
    """
    return _dropped(model, handle_of(model), loss)


def _dropped(
    model: nn.Module, handle: Handle, loss: Callable[[nn.Module], float]
) -> Iterator[Dropped]:
    was_training = model.training
    left = list(range(len(handle.blocks)))

    def without(block: int) -> float:
        gates = [other in left and other != block for other in range(len(handle.blocks))]
        with handle.subnetwork(gates, scaled=True):
            return loss(model)

    while left:
        model.eval()
        try:
            losses = {block: without(block) for block in left}
        finally:
            model.train(was_training)
        best = min(left, key=lambda block: losses[block])
        left.remove(best)
        yield Dropped(best, losses[best], len(losses))


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
    built with fewer layers, and the `config` of a transformers model is updated. The outputs are
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
            names.
        FoldError: when a block cannot take its p_l, which the error names. In each case, and when
            `recalibrate` raises an error, `model` is as it was before.

    Examples:
        >>> model = sd.models.CifarResNet(20)
        >>> handle = sd.apply(model)
        >>> sd.truncate(model, 1, torch.randn(1, 3, 32, 32))  # the first block of each stage
        >>> len(sd.apply(model).blocks)
        3
    """
    closed = _closed(applied_to(model).found, keep)
    refuse_sharded(model, "truncate")
    refuse_nested(example)
    weights = multipliers(model, example, closed)
    twin = copy.deepcopy(model)
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
        update_bn(recalibrate, twin, next(twin.parameters()).device)
    _edit(model, closed, weights)
    if recalibrate is not None:
        for buffer, measured in zip(model.buffers(), twin.buffers(), strict=True):
            buffer.copy_(measured)


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
    if isinstance(keep, int):
        if keep < 1:
            raise TruncateError(f"keep={keep}: at least the first block of each stage is kept")
        keep = [number for stage in stages(found) for number in stage[:keep]]
    wrong = [number for number in keep if not 0 <= number < len(found)]
    if wrong or len(set(keep)) < len(keep):
        raise TruncateError(
            f"keep={list(keep)}: give different positions, from 0 to {len(found) - 1}"
        )
    return [number for number in range(len(found)) if number not in keep]


def _closed_outputs(twin: nn.Module, closed: Sequence[int], example: Example) -> list[Tensor]:
    """The outputs with the blocks `closed` closed.

    Raises:
        TruncateError: when one of them computes something even when it is closed.
    """
    applied = applied_to(twin)
    handles = []
    for number in closed:
        block = applied.found[number]
        if not isinstance(block.module, Residual):
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
    names = [name for number in closed for name in _removed_with(found[number], model, used)]
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
        and isinstance(model.get_submodule(name.rpartition(".")[0]), CONTAINERS)
    ]
    outermost = [n for n in beside if not any(n.startswith(f"{other}.") for other in beside)]
    return list(dict.fromkeys([found.name, *outermost]))
