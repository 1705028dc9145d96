"""Models and settings that `sd.apply` refuses before it looks at anything."""

from typing import get_args

import torch
from torch import nn

from stochastic_depth.choices import Closed, GateKind, Scale, SkippedPolicy
from stochastic_depth.errors import ApplyError
from stochastic_depth.residual import Residual
from stochastic_depth.surgery.blocks import Granularity
from stochastic_depth.surgery.install import is_installed
from stochastic_depth.tensors import tensors_in

_SHARDED = "torch.distributed.fsdp"
_ENGINES = ("torch.nn.parallel", "torch.distributed.fsdp", "torch.distributed._composable")


def refuse_applied(model: nn.Module) -> None:
    """Raise `ApplyError` when `model` is no module, or has stochastic depth already."""
    if not isinstance(model, nn.Module):
        raise ApplyError(f"a model is an nn.Module, and this is {type(model).__name__}")
    for name, module in model.named_modules():
        if is_installed(module) or (isinstance(module, Residual) and module.gates is not None):
            raise ApplyError(
                f"block {name or type(model).__name__!r} has stochastic depth already: "
                "sd.remove(model) first, or sd.remove of the model that shares this block"
            )


def refuse_sharded(model: nn.Module, verb: str) -> None:
    """Raise `ApplyError` if `model` is sharded: then no process has all of its weights."""
    for name, module in model.named_modules():
        if any(base.__module__.startswith(_SHARDED) for base in type(module).__mro__):
            raise ApplyError(
                f"{name or 'the model'!r} is sharded, so that no process has all of its weights: "
                "build the model again, call sd.apply with the same settings, load the gathered "
                "weights (torch.distributed.checkpoint.state_dict, full_state_dict=True), and "
                f"sd.{verb} that model"
            )


def refuse_wrapped(model: nn.Module) -> None:
    """Raise `ApplyError` if `model` is wrapped for several processes, compiled or scripted.

    A wrapper counts every pass through the model, and would count the passes of `sd.apply` too.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ApplyError(
                f"{name or type(model).__name__!r} is scripted already, and cannot be looked into: "
                "sd.apply the original model, and script what sd.fold leaves of it"
            )
        for base in type(module).__mro__:
            if base.__module__.startswith("torch._dynamo"):
                raise ApplyError(
                    f"{name or 'the model'!r} is compiled already (torch.compile): sd.apply the "
                    "original model, then sd.compile_blocks(model)"
                )
            if base is nn.DataParallel:
                raise ApplyError(
                    "nn.DataParallel runs copies of the model in threads, which would draw "
                    "different gates: sd.apply its .module, and train it in "
                    "torch.nn.parallel.DistributedDataParallel, one process for each GPU"
                )
            if base.__module__.startswith(_ENGINES):
                raise ApplyError(
                    f"{base.__name__} is wrapped around blocks of this model already: "
                    "sd.apply(model) first, then wrap or shard it"
                )


def refuse_nested(example: object) -> None:
    """Raise `ApplyError` if an example has nested tensors, which cannot be compared."""
    if any(tensor.is_nested for tensor in tensors_in(example)):
        raise ApplyError(
            "the example has a nested tensor, whose values cannot be compared: give one that is "
            "padded, example=torch.nested.to_padded_tensor(x, 0.0); in training the model may be "
            "given nested tensors"
        )


def refuse_settings(
    gate: GateKind,
    closed: Closed,
    scale: Scale | None,
    skipped: SkippedPolicy,
    granularity: Granularity,
    balance: bool,
    min_samples: int,
    multiple_of: int,
) -> None:
    """Raise `ApplyError` if a setting has an unknown value, or two settings conflict."""
    for option, value, known in (
        ("gate", gate, get_args(GateKind)),
        ("closed", closed, get_args(Closed)),
        ("scale", "inference" if scale is None else scale, ("inference", "training")),
        ("skipped", skipped, get_args(SkippedPolicy)),
        ("granularity", granularity, get_args(Granularity)),
    ):
        if value not in known:
            raise ApplyError(f"{option}={value!r}: choose one of {', '.join(map(repr, known))}")
    if min_samples < 0:
        raise ApplyError(f"min_samples={min_samples}: give a number of samples, 0 or more")
    if min_samples > 0 and gate != "subset":
        raise ApplyError(
            f'min_samples={min_samples} needs gate="subset", this is gate="{gate}": '
            "leave it out, or choose the subset gate"
        )
    if multiple_of < 1:
        raise ApplyError(f"multiple_of={multiple_of}: give a number of samples, 1 or more")
    if multiple_of > 1 and not (balance and gate == "subset"):
        raise ApplyError(
            f'multiple_of={multiple_of} needs gate="subset" and balance=True, this is '
            f'gate="{gate}" and balance={balance}'
        )
    if closed == "forward-only" and gate != "batch":
        raise ApplyError(
            f'closed="forward-only" needs gate="batch", this is gate="{gate}": leave it '
            "out, the branch of a block learns from the whole mini-batch or not at all"
        )
    if closed == "forward-only" and scale is not None:
        raise ApplyError(
            f'scale="{scale}" with closed="forward-only": every branch is added in every step, so '
            "that there is no expectation to correct; leave scale out"
        )
