"""Hooks around the forward and the backward pass of a model with stochastic depth.

A gate belongs to the forward pass that it was drawn for. When that pass is over, no gate is in
force. When its backward pass recomputes a block, the block gets the gate of that forward pass.
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

from stochastic_depth.block import set_training_gates
from stochastic_depth.errors import GateError
from stochastic_depth.gates import Gate
from stochastic_depth.handle import Handle
from stochastic_depth.module_snapshot import GateReaders
from stochastic_depth.tensors import in_graph, replace_tensors, tensors_in
from stochastic_depth.torch_private import (
    at_end_of_backward,
    backward_pass,
    call_of,
    gradients_are_awaited,
    gradients_are_kept,
    is_compiled,
    is_mapped,
    is_replica,
    is_replicated,
    is_transformed,
    never_traced,
    next_node_number,
    node_number,
    outside_transforms,
    set_call,
    tree_leaves,
    whole_call,
)

_REMEMBERED = 64
"""How many of the latest forward passes are kept even if none of their outputs is alive."""


class ForwardHooks:
    """Hooks on a model that draw its gates when a forward pass begins in training mode.

    In the backward pass of that forward pass, recomputed blocks have the same gates, and the
    parameters of closed blocks get the gradient that `handle.skipped` asks for.
    """

    def __init__(self, model: nn.Module, handle: Handle) -> None:
        self.handle, self.blocks = handle, handle.blocks
        self._gate_readers = GateReaders(model, handle.blocks)
        handle.forward_pass = self.forward_pass
        for number, block in enumerate(self.blocks):
            for addition in block.gates:
                addition.recall = partial(self._recall, number)
        self._stack: list[ForwardPass | None] = []
        """The running forward passes, nested; None for a pass in evaluation mode or a
        recomputation."""
        self._passes: list[weakref.ref[ForwardPass]] = []
        """Passes that may still have a backward pass; their outputs keep them alive."""
        self._recent: deque[ForwardPass] = deque(maxlen=_REMEMBERED)
        self._in_backward: dict[int, ForwardPass] = {}
        """For each running backward pass, the forward pass whose graph it has reached."""

    @never_traced
    def before_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Hook on the model: draw gates, unless this is evaluation or a recomputation."""
        self._stack.append(None)
        self._gate_readers.warn_of_replaced(model)
        if not (model.training or any(block.is_training for block in self.blocks)):
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
                    "the model is called in training mode within a backward pass, and it is "
                    "not known which of its forward passes is recomputed there: use "
                    "checkpoint(..., use_reentrant=False)"
                )
            again.backward_begins()
            set_training_gates(self.blocks, again.gates)
            return
        self._refuse_threads()
        batch = None if self.handle.gate == "batch" else batch_size((args, kwargs))
        with outside_transforms():
            gates = self.handle.next_gates(batch)
        self._begin(gates, is_replicated(model))

    @never_traced
    def after_forward(self, model: nn.Module, args: tuple, output: Any) -> Any:
        """Hook on the model; it is also called when the forward pass has failed."""
        if not self._stack:  # a hook before ours has failed
            return output
        trained = self._stack[-1] is not None and torch.is_grad_enabled()
        output = self._end(output)
        if trained or self.handle.is_subnetwork:
            refuse_cache(output)
        return output

    @contextmanager
    def forward_pass(self, gates: list[Gate]) -> Iterator[None]:
        """While entered, the blocks have these gates, as in a forward pass of the model."""
        self._refuse_threads()
        self._stack.append(None)
        self._begin(gates, replicated=False)
        try:
            yield
        finally:
            self._end(None)

    def _refuse_threads(self) -> None:
        """Raise `GateError` when another thread is in a forward pass."""
        if any(there is not None and there.thread != get_ident() for there in self._stack):
            raise GateError(
                "the model is called from two threads at once, in training mode, but it has gates "
                "for one pass at a time: call it from one thread, or give each thread a copy "
                "(copy.deepcopy(model))"
            )

    def _begin(self, gates: list[Gate], replicated: bool) -> None:
        self._in_backward.clear()  # a backward pass that failed may have left an entry
        begun = ForwardPass(self, gates, replicated or gradients_are_awaited(), self._running())
        self._stack[-1] = begun
        self._recent.append(begun)
        self._passes = [ref for ref in self._passes if ref() is not None]
        self._passes.append(weakref.ref(begun))
        set_training_gates(self.blocks, gates)

    def _end(self, output: Any) -> Any:
        ended = self._stack.pop()
        outer = self._running()
        if outer is None:
            self.handle.clear_gates()
        else:
            set_training_gates(self.blocks, outer.gates)
        return output if ended is None else ended.end(output)

    def _running(self) -> "ForwardPass | None":
        """The innermost running forward pass that has drawn gates, or None."""
        return next((each for each in reversed(self._stack) if each is not None), None)

    def _recall(self, number: int) -> Gate | None:
        """The gate of block `number`, if a backward pass is recomputing it; otherwise None."""
        if backward_pass() is None:
            return None
        again = self._pass_of_backward()
        if again is None:
            return None
        again.backward_begins()
        return again.gates[number]

    def _pass_of_backward(self) -> "ForwardPass | None":
        """The forward pass to which the backward pass in this thread belongs."""
        backward = backward_pass()
        assert backward is not None
        outer = [number for number in self._in_backward if number != backward]
        if outer:  # an inner backward pass, which differentiates what the outer one has recomputed
            return self._in_backward[max(outer)]
        return self._pass_of_node(node_number()) or self._in_backward.get(backward)

    def _pass_of_node(self, node: int) -> "ForwardPass | None":
        """The forward pass that created the autograd node numbered `node`; or, for the node of a
        reentrant checkpoint, the pass that ran inside it.

        Each thread numbers its own nodes. The result is None where the number fits several passes:
        those of two threads, or those inside one reentrant checkpoint.
        """
        passes = [each for ref in self._passes if (each := ref()) is not None]
        creators = [each for each in passes if each.first_node <= node < each.end_node]
        if creators:
            return _only([p for p in creators if not any(p is other.outer for other in creators)])
        enclosed = [each for each in passes if each.first_node == node + 1]
        checkpointed = [each for each in enclosed if each.first_node == each.end_node]
        return _only(checkpointed or enclosed)

    def entered_backward(self, of: "ForwardPass") -> bool:
        """Record that the backward pass has reached `of`; returns False if that was known."""
        backward = backward_pass()
        if backward is None or self._in_backward.get(backward) is of:
            return False
        if backward not in self._in_backward:
            at_end_of_backward(partial(self._in_backward.pop, backward, None))
        self._in_backward[backward] = of
        return True

    def __getstate__(self) -> dict[str, Any]:  # a copy has no running passes
        nothing: dict[str, Any] = {"_stack": [], "_passes": [], "_in_backward": {}}
        return {**self.__dict__, **nothing, "_recent": deque(maxlen=_REMEMBERED)}


class ForwardPass:
    """One forward pass in training: its gates, and what happens when its backward pass begins."""

    def __init__(
        self, hooks: ForwardHooks, gates: list[Gate], awaited: bool, outer: "ForwardPass | None"
    ) -> None:
        self._hooks, self.gates = hooks, gates
        self.outer = outer
        """The running forward pass within which this one began."""
        self.thread = get_ident()
        self._needs_all_gradients = awaited
        """Whether DistributedDataParallel waits for a gradient of every parameter."""
        self._freezes = hooks.handle.skipped == "freeze"
        self.first_node = self.end_node = next_node_number()
        """The pass makes the autograd nodes numbered from `first_node` to below `end_node`."""
        self._observed: list[_ObservedCall] = []
        self._blocks = [b for b, g in zip(hooks.blocks, gates, strict=True) if not g.learns]
        """Blocks whose branch passes no gradient."""
        self._pending: dict[nn.Module, list[nn.Parameter]] = {}
        """By module, parameters of closed blocks whose output has not been found in the graph
        yet."""
        self._sparse: set[nn.Parameter] = set()
        self._last_node: tuple[Any, int] | None = None
        """The autograd node of the last closed block's output, and the number of the node's
        result."""
        self._last_parameters: list[nn.Parameter] = []
        if awaited or not self._freezes:
            for block in self._blocks:  # collected now: FSDP replaces parameters while gathered
                parameters = block.trained()
                if parameters:
                    self._pending.setdefault(block.module, []).extend(parameters)
                    self._sparse.update(block.sparse_weights())
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self._observe()

    def _observe(self) -> None:
        """Observe the outputs of closed blocks, to know when a gradient reaches one of them.

        The call of each module is replaced, which costs less than a hook on the module.
        """
        for module in self._pending:
            before = call_of(module)
            if before is None or not is_compiled(module):
                observed = _ObservedCall(self, module, before)
                self._observed.append(observed)
                set_call(module, observed)

    @never_traced
    def note_output(self, module: nn.Module, output: Any) -> Any:
        """Record where in the graph the output of a closed block is; returns the output."""
        parameters = self._pending.get(module)
        if parameters is None or get_ident() != self.thread:
            return output
        if type(output) is Tensor:
            in_graph_now = [output] if output.grad_fn is not None else []
        else:
            in_graph_now = in_graph(output)
        if in_graph_now and self._needs_all_gradients:
            output = attach(output, parameters)
            in_graph_now = in_graph(output)
        for tensor in in_graph_now:
            self._hook_node(tensor, parameters)
        if in_graph_now:
            del self._pending[module]
        return output

    def _hook_node(self, tensor: Tensor, parameters: list[nn.Parameter]) -> None:
        """Give these parameters their gradients when the backward pass reaches `tensor`."""
        place = tensor.grad_fn, tensor.output_nr
        if place == self._last_node:  # an identity shortcut: the previous closed block's output
            self._last_parameters.extend(parameters)
            return
        self._last_node, self._last_parameters = place, list(parameters)
        hook = partial(self._at_node, tensor.output_nr, self._last_parameters)
        place[0].register_prehook(hook)  # pyright: ignore[reportOptionalMemberAccess]

    def end(self, output: Any) -> Any:
        """End the pass; returns its output, to which closed branches are attached where needed."""
        for observed in reversed(self._observed):
            observed.end()
        self._observed.clear()
        self._last_node, self._last_parameters = None, []
        if torch.is_grad_enabled() and output is not None:
            output = self._attached(output)
            for tensor in tensors_in(output):
                if tensor.grad_fn is not None:  # a hook on a leaf would never be removed
                    tensor.register_hook(self.backward_begins)
        self.end_node = next_node_number()
        return output

    def _attached(self, output: Any) -> Any:
        """`output`, with closed branches attached to its graph where DDP or autograd needs it."""
        if is_transformed():  # then gradients are returned, and not kept by parameters
            return output
        if self._needs_all_gradients:
            parameters = [p for left in self._pending.values() for p in left]
        elif any(tensor.grad_fn is not None for tensor in tensors_in(output)):
            return output
        else:
            parameters = [p for block in self._blocks for p in block.trained()]
        return attach(output, parameters)

    def backward_begins(self, _: Tensor | None = None) -> None:
        """Hook: a backward pass has reached a tensor that this pass has computed."""
        if not self._hooks.entered_backward(self):
            return
        self._give_gradients([p for left in self._pending.values() for p in left])
        if any(is_compiled(block.module) for block in self._hooks.blocks):
            set_training_gates(self._hooks.blocks, self.gates)  # compiled code reads them
            at_end_of_backward(self._hooks.handle.clear_gates)

    def _at_node(
        self, number: int, parameters: Sequence[nn.Parameter], gradients: tuple[Tensor | None, ...]
    ) -> None:
        """Hook: a backward pass has reached a node, though maybe not by its result `number`."""
        if gradients[number] is not None:
            self._give_gradients(parameters)

    def _give_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give the parameters of closed blocks zero gradients; under "freeze" only for a moment."""
        without = [p for p in parameters if p.grad is None]
        if without and not gradients_are_kept():
            return
        for parameter in without:
            layout = torch.sparse_coo if parameter in self._sparse else None
            parameter.grad = torch.zeros_like(parameter, layout=layout)
        if self._freezes and without:
            at_end_of_backward(partial(_clear, without), after_others=True)


class _ObservedCall:
    """Is called in place of a module whose output is observed."""

    __slots__ = ("before", "by", "call", "module")
    is_watching = True

    def __init__(self, by: ForwardPass, module: nn.Module, before: Callable[..., Any] | None):
        self.by: ForwardPass | None = by
        self.module, self.before = module, before
        """`before` is what is otherwise called in place of the module's forward method."""
        self.call = before or whole_call(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.call(*args, **kwargs)
        return output if self.by is None else self.by.note_output(self.module, output)

    def end(self) -> None:
        """Stop observing; another thread that observes the module since then continues."""
        self.by = None
        now = call_of(self.module)
        if now is self:
            set_call(self.module, self.before)
            return
        while isinstance(now, _ObservedCall) and now.before is not self:
            now = now.before
        if isinstance(now, _ObservedCall):
            now.before, now.call = self.before, self.call


def _only(passes: Sequence[ForwardPass]) -> ForwardPass | None:
    """The single pass of a list; None where there is no pass, or more than one."""
    return passes[0] if len(passes) == 1 else None


def refuse_cache(output: object) -> None:
    """Raise `GateError` when a model with closed blocks returns a cache of keys and values."""
    if getattr(output, "past_key_values", None) is not None:
        raise GateError(
            "the model returns past_key_values, into which closed blocks put nothing: "
            "call it with use_cache=False, or set model.config.use_cache = False"
        )


def batch_size(inputs: object) -> int:
    """The number of samples in the inputs of a model: the length of the first tensor among them.

    Raises:
        GateError: when there is no tensor.
    """
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor) and is_mapped(leaf):
            raise GateError(
                "the model is called within torch.vmap, which hides the samples from it, and there "
                'are gates for single samples: use gate="batch", whose gates all samples share'
            )
        if isinstance(leaf, Tensor) and leaf.ndim > 0:
            return len(leaf)
    raise GateError(
        "gates for single samples need a tensor [batch, ...] among the model's inputs, and there "
        'is none: use gate="batch"'
    )


def attach(output: Any, parameters: Sequence[nn.Parameter]) -> Any:
    """`output`, with a graph in which autograd reaches each of `parameters` without a gradient.

    `DistributedDataParallel`, and therefore `replicate`, ends a backward pass when autograd has
    reached every parameter. It never reaches those of a branch that did not run. Here they are
    attached to the output of their block, so that autograd reaches them at the time when an open
    branch would be reached. That matters because DDP sends gradients in the order of its very first
    backward pass. Returns `output` itself where no tensor in it can have a gradient.
    """
    tensors = [t for t in tensors_in(output) if not isinstance(t, nn.Parameter)]
    tensors = [t for t in tensors if t.is_floating_point() or t.is_complex()]
    in_graph_now = in_graph(tensors) or tensors
    if not in_graph_now or not parameters:
        return output
    attached = _Attach.apply(len(in_graph_now), *in_graph_now, *reversed(parameters))
    new = {id(old): tensor for old, tensor in zip(in_graph_now, attached, strict=True)}
    return replace_tensors(output, lambda tensor: new.get(id(tensor), tensor))


class _Attach(torch.autograd.Function):
    """The identity of the first `count` tensors."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.others = len(tensors) - count
        # Not views: a view that a function of ours returns must not be changed in place.
        return tuple(tensor.detach() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *gradients, *(None,) * ctx.others


def _clear(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
