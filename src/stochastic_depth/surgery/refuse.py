"""Models and examples that `sd.apply` and other functions refuse at once."""

import torch
from torch import nn

from stochastic_depth.errors import ApplyError
from stochastic_depth.residual import Residual
from stochastic_depth.surgery.install import is_installed
from stochastic_depth.tensors import tensors_in

_SHARDED = "torch.distributed.fsdp"
_WRAPPERS = ("torch.nn.parallel", "torch.distributed.fsdp", "torch.distributed._composable")


def refuse(model: nn.Module, example: object) -> None:
    """Raise `ApplyError` if `sd.apply` cannot work on this model, or with this example."""
    _refuse_applied(model)
    _refuse_wrapped(model)
    refuse_nested(example)


def _refuse_applied(model: nn.Module) -> None:
    """Raise `ApplyError` if `model` is not a module, or has stochastic depth already."""
    if not isinstance(model, nn.Module):
        raise ApplyError(f"the model must be an nn.Module, this is {type(model).__name__}")
    for name, module in model.named_modules():
        if is_installed(module) or (isinstance(module, Residual) and module.gates is not None):
            raise ApplyError(
                f"block {name or type(model).__name__!r} has stochastic depth already: "
                "sd.remove(model) first, or sd.remove of the model that shares this block"
            )


def refuse_sharded(model: nn.Module, verb: str) -> None:
    """Raise `ApplyError` if `model` is sharded, so that no process has all of its weights."""
    for name, module in model.named_modules():
        if _base_from(_SHARDED, of=module):
            raise ApplyError(
                f"{name or 'the model'!r} is sharded, so that no process has all of its weights: "
                "build the model again, call sd.apply with the same settings, load the gathered "
                "weights (torch.distributed.checkpoint.state_dict, full_state_dict=True), and "
                f"sd.{verb} that model"
            )


def _refuse_wrapped(model: nn.Module) -> None:
    """Raise `ApplyError` if `model` is wrapped for several processes, traced, compiled or scripted.

    A wrapper counts every pass through the model, and would count the passes of `sd.apply` too.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.fx.GraphModule):
            raise ApplyError(
                f"{name or type(model).__name__!r} is a torch.fx.GraphModule, which builds its "
                "class again when it is copied or recompiled, and loses its gates: sd.apply the "
                "original model, and trace the model after sd.fold; for features in training, use "
                "module.register_forward_hook"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise ApplyError(
                f"{name or type(model).__name__!r} is scripted already, so its code cannot be "
                "changed: sd.apply the original model, and script the model after sd.fold"
            )
        if _base_from("torch._dynamo", of=module):
            raise ApplyError(
                f"{name or 'the model'!r} is compiled already (torch.compile): sd.apply the "
                "original model, then sd.compile_blocks(model)"
            )
        if isinstance(module, nn.DataParallel):
            raise ApplyError(
                "nn.DataParallel runs copies of the model in threads, which would draw different "
                "gates: sd.apply its .module, and train it in "
                "torch.nn.parallel.DistributedDataParallel, one process for each GPU"
            )
        if wrapper := _base_from(*_WRAPPERS, of=module):
            raise ApplyError(
                f"{wrapper.__name__} is wrapped around blocks of this model already: "
                "sd.apply(model) first, then wrap or shard it"
            )


def _base_from(*packages: str, of: nn.Module) -> type | None:
    """The first class of `of` that one of these packages defines, or None."""
    return next((c for c in type(of).__mro__ if c.__module__.startswith(packages)), None)


def refuse_nested(example: object) -> None:
    """Raise `ApplyError` if an example has nested tensors, which cannot be compared."""
    if any(tensor.is_nested for tensor in tensors_in(example)):
        raise ApplyError(
            "the example has a nested tensor, whose values cannot be compared: give a padded one, "
            "example=torch.nested.to_padded_tensor(x, 0.0); in training the model may get nested "
            "tensors"
        )
