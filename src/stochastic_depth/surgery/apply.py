"""Make the residual units of a model skippable, and undo it."""

from typing import get_args

from torch import nn

from stochastic_depth.depth import SkippedPolicy, StochasticDepth
from stochastic_depth.errors import ApplyError
from stochastic_depth.gates import GateKind, Scale
from stochastic_depth.residual import Residual
from stochastic_depth.survival import LinearDecay, SurvivalRule

_HANDLES = "_stochastic_depth_hooks"


def apply(
    model: nn.Module,
    survival: SurvivalRule | None = None,
    *,
    gate: GateKind = "batch",
    scale: Scale = "inference",
    skipped: SkippedPolicy = "paper",
    seed: int = 0,
) -> StochasticDepth:
    """Give a model of `sd.Residual` units stochastic depth, in place.

    The training loop stays as it is: gates are drawn by a hook whenever `model` is called in
    training mode. Parameter names and `state_dict` keys do not change.

    Args:
        model: holds at least one `sd.Residual`; blocks are numbered in order of registration.
        survival: p_l; `sd.LinearDecay(0.5)` when not given.
        gate: "batch", one coin a block and mini-batch (the paper): a closed block costs nothing;
            "sample", one coin a sample, masked: the DropPath of timm and torchvision, saves
            nothing; "subset", one coin a sample, and the branch runs on the drawn samples only.
        scale: "inference" multiplies by p_l in evaluation (the paper), "training" divides by p_l
            in training.
        skipped: the gradient of a skipped block's parameters: "paper" makes it zero, so that
            momentum and weight decay still move them; "freeze" leaves it None.
        seed: chooses the sequence of gates.

    Returns:
        The handle: probabilities, gates, and the state for checkpoints.

    Raises:
        ApplyError: when `model` has no residual unit or has stochastic depth already.
        SurvivalError: when a p_l is outside (0, 1].
    """
    for name, value, known in (
        ("gate", gate, get_args(GateKind)),
        ("scale", scale, get_args(Scale)),
        ("skipped", skipped, get_args(SkippedPolicy)),
    ):
        if value not in known:
            raise ApplyError(f"{name}={value!r}: choose one of {', '.join(map(repr, known))}")
    units = {name: m for name, m in model.named_modules() if isinstance(m, Residual)}
    if not units:
        raise ApplyError(
            f"no residual unit found in {type(model).__name__}, so nothing can be skipped: "
            "build its blocks from sd.Residual(branch, shortcut, activation)"
        )
    for name, unit in units.items():
        if unit.gates is not None:
            raise ApplyError(
                f"block {name or type(model).__name__!r} has stochastic depth already: "
                "sd.remove(model) first"
            )
    depth = StochasticDepth(units.values(), survival or LinearDecay(), gate, scale, skipped, seed)
    handles = (
        model.register_forward_pre_hook(depth.before_forward, with_kwargs=True),
        model.register_forward_hook(depth.after_forward),
    )
    setattr(model, _HANDLES, handles)
    return depth


def remove(model: nn.Module) -> None:
    """Undo `sd.apply`: the original model of constant depth, with the weights it has now.

    Raises:
        ApplyError: when `model` is not one that `sd.apply` was given.
    """
    if not hasattr(model, _HANDLES):
        raise ApplyError(
            f"{type(model).__name__} has no stochastic depth to remove: give the model that "
            "sd.apply was given"
        )
    for handle in getattr(model, _HANDLES):
        handle.remove()
    delattr(model, _HANDLES)
    for module in model.modules():
        if isinstance(module, Residual):
            module.gates = None
