"""What happens around the forward and the backward pass of a model with stochastic depth.

A gate belongs to the forward pass that it was drawn for. When that is over no gate is in force any
more; when its backward pass recomputes a block, the block asks for its gate of then.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.block import open_in_training
from stochastic_depth.errors import GateError
from stochastic_depth.gates import Gate
from stochastic_depth.handle import Handle
from stochastic_depth.tensors import in_graph, replace_tensors, tensors_in
from stochastic_depth.torch_private import (
    at_end_of_backward,
    backward_pass,
    call_of,
    gradients_are_awaited,
    gradients_are_kept,
    is_compiled,
    is_replica,
    is_replicated,
    never_traced,
    next_node_number,
    node_number,
    set_call,
    tree_leaves,
    whole_call,
)

_REMEMBERED = 64
"""So many passes are kept of which nothing that was computed can be seen."""


class ForwardHooks:
    """Hooks on a model: gates are drawn when its forward pass begins in training mode.

    In the backward pass of that forward pass the blocks that are computed again have the same
    gates, and the parameters of closed blocks get the gradient that `handle.skipped` says.
    """

    def __init__(self, handle: Handle) -> None:
        self.handle, self.blocks = handle, handle.blocks
        handle.scope = self.during
        for number, block in enumerate(self.blocks):
            for addition in block.gates:
                addition.recall = partial(self._recall, number)
        self._under_way: list[ForwardPass | None] = []
        """Passes that have begun and not ended; None in evaluation and while recomputing."""
        self._passes: list[weakref.ref[ForwardPass]] = []
        """Those that may still have a backward pass: what they computed holds them."""
        self._recent: deque[ForwardPass] = deque(maxlen=_REMEMBERED)
        self._in_backward: dict[int, ForwardPass] = {}
        """For each backward pass under way the forward pass that it is in."""

    @never_traced
    def before_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Hook on the model: draw, unless this is evaluation or a recomputation."""
        self._under_way.append(None)
        if not (model.training or any(block.is_in_training for block in self.blocks)):
            return
        if is_replica(model):
            raise GateError(
                "nn.DataParallel runs copies of the model in threads, which would draw different "
                "gates: use torch.nn.parallel.DistributedDataParallel, one process for each GPU "
                "(torchrun), or one GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        if backward_pass() is not None:
            again = self._pass_of_backward()
            if again is None:
                raise GateError(
                    "the model is called in training mode within a backward pass, and it cannot "
                    "be told which of its forward passes is computed again there: use "
                    "checkpoint(..., use_reentrant=False)"
                )
            again.backward_begins()
            open_in_training(self.blocks, again.gates)
            return
        self._refuse_threads()
        batch = None if self.handle.gate == "batch" else batch_size((args, kwargs))
        self._begin(self.handle.next_gates(batch), is_replicated(model))

    @never_traced
    def after_forward(self, model: nn.Module, args: tuple, output: Any) -> Any:
        """Hook on the model, also when its forward pass has failed."""
        if not self._under_way:  # a hook before ours has failed
            return output
        trained = self._under_way[-1] is not None and torch.is_grad_enabled()
        output = self._end(output)
        if trained or self.handle.is_subnetwork:
            refuse_cache(output)
        return output

    @contextmanager
    def during(self, gates: list[Gate]) -> Iterator[None]:
        """While entered, parts of the model that are called have these gates."""
        self._refuse_threads()
        self._under_way.append(None)
        self._begin(gates, replicated=False)
        try:
            yield
        finally:
            self._end(None)

    def _refuse_threads(self) -> None:
        """Raise `GateError` when a pass of another thread is under way."""
        if any(there is not None and there.thread != get_ident() for there in self._under_way):
            raise GateError(
                "the model is called from two threads at once, in training mode, and its gates are "
                "those of one pass at a time: call it from one thread, or a copy in each "
                "(copy.deepcopy(model))"
            )

    def _begin(self, gates: list[Gate], replicated: bool) -> None:
        self._in_backward.clear()  # of one that has failed
        begun = ForwardPass(self, gates, replicated or gradients_are_awaited())
        self._under_way[-1] = begun
        self._recent.append(begun)
        self._passes = [ref for ref in self._passes if ref() is not None]
        self._passes.append(weakref.ref(begun))
        open_in_training(self.blocks, gates)

    def _end(self, output: Any) -> Any:
        ended = self._under_way.pop()
        around = next((outer for outer in reversed(self._under_way) if outer is not None), None)
        if around is None:
            self.handle.rest()
        else:
            open_in_training(self.blocks, around.gates)
        return output if ended is None else ended.end(output)

    def _recall(self, number: int) -> Gate | None:
        """The gate of a block that a backward pass recomputes; None elsewhere."""
        if backward_pass() is None:
            return None
        again = self._pass_of_backward()
        if again is None:
            return None
        again.backward_begins()
        return again.gates[number]

    def _pass_of_backward(self) -> "ForwardPass | None":
        """The forward pass whose backward pass is under way here."""
        backward = backward_pass()
        assert backward is not None
        outer = [number for number in self._in_backward if number != backward]
        if outer:  # this one is part of another, and differentiates what that has recomputed
            return self._in_backward[max(outer)]
        return self._pass_of(node_number()) or self._in_backward.get(backward)

    def _pass_of(self, node: int) -> "ForwardPass | None":
        """The forward pass in which the node with this number was made, or which it is around."""
        passes = [there for ref in self._passes if (there := ref()) is not None]
        for there in passes:
            if there.first <= node < there.end_:
                return there
        around = [there for there in passes if there.first == node + 1]
        if len([there for there in around if there.first == there.end_]) > 1:
            return None  # several within one reentrant checkpoint
        return around[0] if around else None

    def entered_backward(self, of: "ForwardPass") -> bool:
        """Note that the backward pass under way is in `of`; whether that is news."""
        backward = backward_pass()
        if backward is None or self._in_backward.get(backward) is of:
            return False
        if backward not in self._in_backward:
            at_end_of_backward(partial(self._in_backward.pop, backward, None))
        self._in_backward[backward] = of
        return True

    def __getstate__(self) -> dict[str, Any]:  # a copy has no passes under way
        nothing: dict[str, Any] = {"_under_way": [], "_passes": [], "_in_backward": {}}
        return {**self.__dict__, **nothing, "_recent": deque(maxlen=_REMEMBERED)}


class ForwardPass:
    """One forward pass in training: its gates, and what is done when its backward pass begins."""

    def __init__(self, hooks: ForwardHooks, gates: list[Gate], awaited: bool) -> None:
        self._hooks, self.gates = hooks, gates
        self.thread = get_ident()
        self._awaited = awaited
        """Whether somebody waits for a gradient of every parameter."""
        self._clears = hooks.handle.skipped == "freeze"
        self.first = self.end_ = next_node_number()
        """Nodes of the graph that are made meanwhile have a number from `first` to below `end_`."""
        self._watched: list[_Watched] = []
        self._blocks = [b for b, g in zip(hooks.blocks, gates, strict=True) if not g.learns]
        """Those that pass no gradient."""
        self._left: dict[nn.Module, list[nn.Parameter]] = {}
        """Parameters of closed blocks whose place in the graph is not known (yet), by module."""
        self._sparse: set[nn.Parameter] = set()
        self._last_place: tuple[Any, int] | None = None
        """Where in the graph what the last closed block gave is, while this pass is under way."""
        self._of_last_place: list[nn.Parameter] = []
        if awaited or not self._clears:
            for block in self._blocks:  # now: while FSDP has gathered them they are others
                parameters = block.trained()
                if parameters:
                    self._left.setdefault(block.module, []).extend(parameters)
                    self._sparse.update(block.sparse_weights())
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self._watch()

    def _watch(self) -> None:
        """Look at what closed blocks give: where a gradient passes it, it passes the block.

        As the call of their modules, which costs less than a hook on each.
        """
        for module in self._left:
            before = call_of(module)
            if before is None or not is_compiled(module):
                watched = _Watched(self, module, before)
                self._watched.append(watched)
                set_call(module, watched)

    @never_traced
    def passed(self, module: nn.Module, output: Any) -> Any:
        """What the module of a closed block has given, whose place in the graph is noted."""
        parameters = self._left.get(module)
        if parameters is None or get_ident() != self.thread:
            return output
        if type(output) is Tensor:
            places = [output] if output.grad_fn is not None else []
        else:
            places = in_graph(output)
        if places and self._awaited:
            output = attach(output, parameters)
            places = in_graph(output)
        for tensor in places:
            self._tell(tensor, parameters)
        if places:
            del self._left[module]
        return output

    def _tell(self, tensor: Tensor, parameters: list[nn.Parameter]) -> None:
        """When the backward pass comes to `tensor`, it comes to the closed blocks with these."""
        place = tensor.grad_fn, tensor.output_nr
        if place == self._last_place:  # its shortcut has given what the closed block before gave
            self._of_last_place.extend(parameters)
            return
        self._last_place, self._of_last_place = place, list(parameters)
        hook = partial(self._reached_at, tensor.output_nr, self._of_last_place)
        place[0].register_prehook(hook)  # pyright: ignore[reportOptionalMemberAccess]

    def end(self, output: Any) -> Any:
        """The output of the pass, made part of the graph where nothing else makes it one."""
        for watched in reversed(self._watched):
            watched.end()
        self._watched.clear()
        self._last_place, self._of_last_place = None, []
        if torch.is_grad_enabled() and output is not None:
            output = self._attached(output)
            for tensor in tensors_in(output):
                if tensor.grad_fn is not None:  # on a leaf a hook would stay for good
                    tensor.register_hook(self.backward_begins)
        self.end_ = next_node_number()
        return output

    def _attached(self, output: Any) -> Any:
        """`output` with closed branches attached if they are awaited, or all that is trained."""
        if self._awaited:
            parameters = [p for left in self._left.values() for p in left]
        elif any(tensor.grad_fn is not None for tensor in tensors_in(output)):
            return output
        else:
            parameters = [p for block in self._blocks for p in block.trained()]
        return attach(output, parameters)

    def backward_begins(self, _: Tensor | None = None) -> None:
        """A backward pass has come to what this pass has computed."""
        if not self._hooks.entered_backward(self):
            return
        self._reached([p for left in self._left.values() for p in left])
        if any(is_compiled(block.module) for block in self._hooks.blocks):
            open_in_training(self._hooks.blocks, self.gates)  # which the compiler looks at
            at_end_of_backward(self._hooks.handle.rest)

    def _reached_at(
        self, number: int, parameters: Sequence[nn.Parameter], gradients: tuple[Tensor | None, ...]
    ) -> None:
        """A backward pass has come to a node of the graph, perhaps by the result with a number."""
        if gradients[number] is not None:
            self._reached(parameters)

    def _reached(self, parameters: Sequence[nn.Parameter]) -> None:
        """A gradient has come to closed blocks: give their parameters the one that they get."""
        without = [p for p in parameters if p.grad is None]
        if without and not gradients_are_kept():
            return
        for parameter in without:
            layout = torch.sparse_coo if parameter in self._sparse else None
            parameter.grad = torch.zeros_like(parameter, layout=layout)
        if self._clears and without:
            at_end_of_backward(partial(_clear, without), after_others=True)


class _Watched:
    """The call of a module whose output is looked at."""

    __slots__ = ("before", "by", "call", "module")
    is_watching = True

    def __init__(self, by: ForwardPass, module: nn.Module, before: Callable[..., Any] | None):
        self.by: ForwardPass | None = by
        self.module, self.before = module, before
        """`before` is what is called in place of its forward method and hooks otherwise."""
        self.call = before or whole_call(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.call(*args, **kwargs)
        return output if self.by is None else self.by.passed(self.module, output)

    def end(self) -> None:
        """Look no more; another thread may have begun to look since, and go on."""
        self.by = None
        now = call_of(self.module)
        if now is self:
            set_call(self.module, self.before)
            return
        while isinstance(now, _Watched) and now.before is not self:
            now = now.before
        if isinstance(now, _Watched):
            now.before, now.call = self.before, self.call


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


def attach(output: Any, parameters: Sequence[nn.Parameter]) -> Any:
    """`output`, in whose backward pass each of `parameters` reports that it has no gradient.

    `DistributedDataParallel`, and so `replicate`, ends a backward pass when every parameter has
    reported, and a branch that did not run reports nothing. Attached to the output of its block,
    its parameters report when they would have reported a gradient: the order of the first backward
    pass is the order in which gradients are sent ever after. `output` itself, where nothing in it
    could have a gradient.
    """
    tensors = [t for t in tensors_in(output) if not isinstance(t, nn.Parameter)]
    tensors = [t for t in tensors if t.is_floating_point() or t.is_complex()]
    places = in_graph(tensors) or tensors
    if not places or not parameters:
        return output
    attached = _Attach.apply(len(places), *places, *reversed(parameters))
    new = {id(old): tensor for old, tensor in zip(places, attached, strict=True)}
    return replace_tensors(output, lambda tensor: new.get(id(tensor), tensor))


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


def _clear(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
