"""Make the residual blocks of a model skippable, and undo it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from torch import nn
from torch.utils.hooks import RemovableHandle

from stochastic_depth.depth import Block, SkippedPolicy, StochasticDepth
from stochastic_depth.errors import ApplyError, UnsupportedBlockError
from stochastic_depth.gates import BlockGates, GateKind, Scale
from stochastic_depth.residual import Residual
from stochastic_depth.surgery.droppath import Silenced, silence
from stochastic_depth.surgery.find import (
    Example,
    Exclude,
    Found,
    Granularity,
    caller,
    find_blocks,
    find_residuals,
    unsupported,
)
from stochastic_depth.surgery.install import install, is_installed, uninstall
from stochastic_depth.surgery.verify import check, check_training, establish
from stochastic_depth.survival import LinearDecay, SurvivalRule, survival_probabilities

_APPLIED = "_stochastic_depth_applied"
"""The attribute of a model that holds what `remove` needs."""


@dataclass(frozen=True)
class _Applied:
    depth: StochasticDepth
    hooks: tuple[RemovableHandle, ...]
    silenced: list[Silenced]


def apply(
    model: nn.Module,
    survival: SurvivalRule | None = None,
    *,
    example: Example | None = None,
    exclude: Exclude = (),
    granularity: Granularity = "block",
    gate: GateKind = "batch",
    scale: Scale = "inference",
    skipped: SkippedPolicy = "paper",
    seed: int = 0,
) -> StochasticDepth:
    """Make the residual blocks of `model` skippable, in place.

    The training loop stays as it is: gates are drawn by a hook whenever `model` is called in
    training mode. Parameter names, `state_dict` keys and classes (for `isinstance`) do not change.

    With an `example` the blocks of any model are found by watching one forward pass, cut so that a
    closed block runs nothing of its branch, and verified: every gate open gives the original
    outputs bit for bit; each block closed, and random sets of them, give those of the original
    model whose additions return their shortcut; and a training step works. A model built from
    `sd.Residual` units needs no example. Drop paths inside of the blocks (timm's, torchvision's,
    transformers') are set to rate 0 until `sd.remove`: their job is taken over.

    Args:
        model: holds residual blocks.
        survival: p_l; `sd.LinearDecay(0.5)` when not given.
        example: inputs of one forward call: a tensor, a tuple of arguments, or a mapping of
            keyword arguments. A small batch will do.
        exclude: modules to leave as they are, by name or class.
        granularity: "block", one coin for all residual additions of a module; or "unit", one each.
        gate: "batch", one coin a block and mini-batch (the paper): a closed block costs nothing;
            "sample", one coin a sample, masked: the DropPath of timm and torchvision, saves
            nothing; "subset", one coin a sample, and the branch runs on the drawn samples only
            (`sd.Residual` units alone).
        scale: "inference" multiplies by p_l in evaluation (the paper), "training" divides by p_l
            in training.
        skipped: the gradient of a skipped block's parameters: "paper" makes it zero, so that
            momentum and weight decay still move them; "freeze" leaves it None.
        seed: chooses the sequence of gates.

    Returns:
        The handle: probabilities, gates, and the state for checkpoints. Blocks are numbered in the
        order in which they run on `example`, or without one in order of registration.

    Raises:
        ApplyError: when `model` has no residual block, or has stochastic depth already.
        UnsupportedBlockError: when a block cannot be made skippable; `model` is as it was.
        SurvivalError: when a p_l is outside (0, 1].
    """
    for option, value, known in (
        ("gate", gate, get_args(GateKind)),
        ("scale", scale, get_args(Scale)),
        ("skipped", skipped, get_args(SkippedPolicy)),
        ("granularity", granularity, get_args(Granularity)),
    ):
        if value not in known:
            raise ApplyError(f"{option}={value!r}: choose one of {', '.join(map(repr, known))}")
    _refuse_applied(model)
    if example is None:
        found = find_residuals(model, exclude)
    else:
        found = find_blocks(model, example, granularity, exclude)
    if not found:
        raise ApplyError(_nothing_found(model, example))
    foreign = [block.name for block in found if block.sites]
    if gate == "subset" and foreign:
        raise ApplyError(
            f'gate="subset" runs a branch on a part of the samples, which {foreign[0]!r} cannot be '
            'cut for: use gate="batch" or "sample", or build the block from sd.Residual'
        )
    rule = survival or LinearDecay()
    survival_probabilities(rule, len(found))
    silenced = silence(found)
    try:
        blocks = _open_up(model, found, example)
    except BaseException:
        for drop_path in silenced:
            drop_path.restore()
        _close_up(model)
        raise
    depth = StochasticDepth(blocks, rule, gate, scale, skipped, seed)
    hooks = (
        model.register_forward_pre_hook(depth.before_forward, with_kwargs=True),
        model.register_forward_hook(depth.after_forward),
    )
    setattr(model, _APPLIED, _Applied(depth, hooks, silenced))
    return depth


def remove(model: nn.Module) -> None:
    """Undo `sd.apply`: the original model of constant depth, with the weights it has now.

    Raises:
        ApplyError: when `model` is not one that `sd.apply` was given.
    """
    applied = _applied(model)
    for hook in applied.hooks:
        hook.remove()
    for drop_path in applied.silenced:
        drop_path.restore()
    delattr(model, _APPLIED)
    _close_up(model)


def depth_of(model: nn.Module) -> StochasticDepth:
    """The handle that `sd.apply` returned for `model`, or for the model that it is a copy of.

    Raises:
        ApplyError: when `model` is not one that `sd.apply` was given.
    """
    return _applied(model).depth


def _applied(model: nn.Module) -> _Applied:
    applied: _Applied | None = getattr(model, _APPLIED, None)
    if applied is None:
        raise ApplyError(
            f"{type(model).__name__} has no stochastic depth: give the model that sd.apply was "
            "given"
        )
    return applied


def _open_up(model: nn.Module, found: Sequence[Found], example: Example | None) -> list[Block]:
    """Give every block its gates, and verify those that were cut."""
    if example is None or not any(block.sites for block in found):
        return [_block(block, {}) for block in found]
    run = caller(model, example)
    truth = establish(model, run, found)
    gates: dict[tuple[nn.Module, object], BlockGates] = {}
    for module, name in {block.module: block.name for block in found if block.sites}.items():
        sites = tuple(s for block in found if block.module is module for s in block.sites)
        try:
            gates |= {(module, s): g for s, g in zip(sites, install(module, sites), strict=True)}
        except UnsupportedBlockError as error:
            raise unsupported(name, module, error) from error
    blocks = [_block(block, gates) for block in found]
    check(model, run, found, blocks, truth)
    check_training(model, run, blocks)
    return blocks


def _block(found: Found, gates: dict[tuple[nn.Module, object], BlockGates]) -> Block:
    if isinstance(found.module, Residual):
        install(found.module, ())
        found.module.gates = BlockGates()
        return Block(found.name, (found.module.gates,), found.parameters)
    mine = tuple(gates[found.module, site] for site in found.sites)
    return Block(found.name, mine, found.parameters)


def _close_up(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, Residual):
            module.gates = None
        if is_installed(module):
            uninstall(module)


def _refuse_applied(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if is_installed(module) or (isinstance(module, Residual) and module.gates is not None):
            raise ApplyError(
                f"block {name or type(model).__name__!r} has stochastic depth already: "
                "sd.remove(model) first"
            )


def _nothing_found(model: nn.Module, example: Example | None) -> str:
    found = f"no residual block found in {type(model).__name__}, so nothing can be skipped"
    if example is None:
        return f"{found}: give example=, the inputs of one forward call, to find those of any model"
    return (
        f"{found}: a block must add what it computes to its input, or to a projection of it; "
        "concatenation (DenseNet), gating and subtraction are not residual"
    )
