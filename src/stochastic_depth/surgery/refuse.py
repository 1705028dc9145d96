"""Models and settings that `sd.apply` refuses before it looks at anything."""

import torch
from torch import nn

from stochastic_depth.errors import ApplyError
from stochastic_depth.residual import Residual
from stochastic_depth.surgery.install import is_installed

_SHARDED = "torch.distributed.fsdp"


_ENGINES = ("torch.nn.parallel", "torch.distributed.fsdp", "torch.distributed._composable")


def refuse_applied(model: nn.Module) -> None:
    """Raise `ApplyError` when a block of `model` has stochastic depth already."""
    for name, module in model.named_modules():
        if is_installed(module) or (isinstance(module, Residual) and module.gates is not None):
            raise ApplyError(
                f"block {name or type(model).__name__!r} has stochastic depth already: "
                "sd.remove(model) first"
            )


def refuse_sharded(model: nn.Module, verb: str) -> None:
    """Raise `ApplyError` when `model` is sharded, so that one process does not have its weights."""
    for name, module in model.named_modules():
        if any(base.__module__.startswith(_SHARDED) for base in type(module).__mro__):
            raise ApplyError(
                f"{name or 'the model'!r} is sharded: sd.{verb} a model that is not, to which "
                "sd.apply was given the same settings and load_state_dict the gathered weights "
                "(torch.distributed.checkpoint.state_dict, full_state_dict=True)"
            )


def refuse_wrapped(model: nn.Module) -> None:
    """Raise `ApplyError` when several processes share `model` already.

    What makes them so notes every pass through the model, and would note those of a look at it.
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
