"""Closed branches as a part of the graph, for those who wait for the gradient of every parameter.

`DistributedDataParallel`, and so `replicate`, ends a backward pass when every parameter has
reported, and a branch that did not run reports nothing. Attached to the output of its block, its
parameters report that there is no gradient, at the moment at which they would have reported one:
the order of the first backward pass is the order in which gradients are sent ever after.
"""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed._composable.replicate import DDP as Replicated  # noqa: N811
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

Branch = tuple[str, list[nn.Parameter]]
"""The name of a block, and the parameters of its branch."""


def are_awaited(model: nn.Module) -> bool:
    """Whether the forward pass of `model` that begins is one of `DistributedDataParallel`.

    That of a model under `replicate` becomes one by a hook that comes after ours.
    """
    active = DistributedDataParallel._get_active_ddp_module() is not None
    return active or isinstance(model, Replicated)


class Attachment:
    """Attaches the branches that are closed in the forward pass that begins."""

    def __init__(self, model: nn.Module, closed: Sequence[Branch]) -> None:
        self._left: dict[str, list[nn.Parameter]] = {}
        for name, parameters in closed:  # two blocks of one name are additions of one module
            self._left.setdefault(name, []).extend(parameters)
        self._hooks: list[RemovableHandle] = []
        for name in self._left:
            with suppress(AttributeError):  # a name that is not that of a module
                module = model.get_submodule(name)
                if module._compiled_call_impl is None:  # it would keep its hook for good
                    hook = module.register_forward_hook(partial(self._passed, name))
                    self._hooks.append(hook)

    def _passed(self, name: str, module: nn.Module, args: tuple, output: Any) -> Any:
        attached = attach(output, self._left.get(name, ()))
        if attached is not output:
            del self._left[name]
        return attached

    def finish(self, output: Any) -> Any:
        """The output of the model, with the branches attached that could not be before."""
        self.remove_hooks()
        return attach(output, [p for parameters in self._left.values() for p in parameters])

    def remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()


def attach(output: Any, parameters: Sequence[nn.Parameter]) -> Any:
    """`output`, in whose backward pass each of `parameters` reports that it has no gradient.

    `output` itself, where it has no backward pass.
    """
    leaves, structure = tree_flatten(output)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not places or not parameters:
        return output
    attached = _Attach.apply(len(places), *(leaves[i] for i in places), *reversed(parameters))
    for place, leaf in zip(places, attached, strict=True):
        leaves[place] = leaf
    return tree_unflatten(leaves, structure)


def clear_afterwards(parameters: Sequence[nn.Parameter]) -> None:
    """Within a backward pass: when it has ended, leave `parameters` without a gradient."""
    engine = Variable._execution_engine

    def clear() -> None:
        for parameter in parameters:
            parameter.grad = None

    # Asked for at the end, it comes after what others asked for meanwhile.
    engine.queue_callback(lambda: engine.queue_callback(clear))


class _Attach(torch.autograd.Function):
    """The identity of the first `count` tensors."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.others = len(tensors) - count
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *gradients, *(None,) * ctx.others
