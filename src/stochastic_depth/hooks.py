"""What happens around the forward and the backward pass of a model with stochastic depth."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed._composable.replicate import DDP as Replicated  # noqa: N811
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.hooks import RemovableHandle

from stochastic_depth.errors import GateError
from stochastic_depth.gates import Gate
from stochastic_depth.handle import Handle, open_in_training

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


class ForwardHooks:
    """Hooks on a model: gates are drawn when its forward pass begins in training mode.

    When the backward pass of that forward pass begins they are put back, so that activation
    checkpointing recomputes every block as it was; and what is skipped gets the gradient that
    `handle.skipped` says.
    """

    def __init__(self, handle: Handle) -> None:
        self._depth, self._blocks = handle, handle.blocks
        self._passes_since_backward = 0
        self._attachment: Attachment | None = None

    def before_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Hook on the model: draw, unless this is evaluation or a recomputation."""
        if self._attachment is not None:  # of a forward pass that has failed
            self._attachment.remove_hooks()
            self._attachment = None
        if not model.training:
            open_in_training(self._blocks, [None] * len(self._blocks))
        elif self._depth.at_full_depth:
            open_in_training(self._blocks, [block.in_evaluation for block in self._blocks])
        elif not _in_backward():
            by_sample = self._depth.gate != "batch"
            self._depth.draw(batch_size((args, kwargs)) if by_sample else None)
            self._passes_since_backward += 1
            if torch.is_grad_enabled() and are_awaited(model):
                self._attachment = Attachment(model, self._closed(model, self._gates))
        elif self._passes_since_backward > 1:
            raise GateError(
                "the whole model is recomputed after several forward passes, and reentrant "
                "checkpointing does not tell which: use checkpoint(..., use_reentrant=False)"
            )

    def after_forward(self, model: nn.Module, args: tuple, output: Any) -> Any:
        """Hook on the model: be there when the backward pass of this forward pass begins."""
        if not model.training and self._depth.is_subnetwork:
            refuse_cache(output)
        if not model.training or not torch.is_grad_enabled():
            return output
        refuse_cache(output)
        gates, awaited = self._gates, self._attachment is not None
        if self._attachment is not None:
            output, self._attachment = self._attachment.finish(output), None

        def backward_begins(_: Tensor) -> None:
            self._passes_since_backward = 0
            open_in_training(self._blocks, gates)
            closed = self._closed(model, gates)
            without = [p for _, parameters in closed for p in parameters if p.grad is None]
            if self._depth.skipped == "paper" or awaited:
                for parameter in without:
                    parameter.grad = torch.zeros_like(parameter)
            if self._depth.skipped == "freeze" and awaited:
                clear_afterwards(without)

        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(backward_begins)
        return output

    @property
    def _gates(self) -> list[Gate | None]:
        return [block.in_training for block in self._blocks]

    def _closed(self, model: nn.Module, gates: Iterable[Gate | None]) -> list[Branch]:
        """The closed blocks, and the parameters of theirs that are trained."""
        return [
            (
                block.name,
                [p for name in block.parameters if (p := _parameter(model, name)).requires_grad],
            )
            for block, gate in zip(self._blocks, gates, strict=True)
            if gate is not None and not gate.learns
        ]


def _in_backward() -> bool:
    """Whether autograd is at work, so that a forward pass is a recomputation."""
    return torch._C._current_graph_task_id() != -1


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    """`model.get_parameter(name)` without its checks, which cost more than the zeros."""
    *path, last = name.split(".")
    for part in path:
        model = model._modules[part]  # type: ignore[assignment]
    return model._parameters[last]  # type: ignore[return-value]


def refuse_cache(output: object) -> None:
    """Raise `GateError` when a model with closed blocks returns a cache of keys and values."""
    if getattr(output, "past_key_values", None) is not None:
        raise GateError(
            "the model returns past_key_values, which closed blocks put nothing into: "
            "call it with use_cache=False, or set model.config.use_cache = False"
        )


def batch_size(inputs: object) -> int:
    """The number of samples in the inputs of a model: that of the first tensor among them.

    Raises:
        GateError: when there is none.
    """
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.ndim > 0:
            return len(leaf)
    raise GateError("gates for single samples need a tensor [batch, ...] among the model's inputs")
