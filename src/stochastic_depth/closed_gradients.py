"""The gradients of the parameters of closed blocks, whose branches autograd never reaches.

Under skipped="paper" they are zeros, under "freeze" None. When they are given depends on the pass:

- Where the output of a closed block is in the graph: when a gradient reaches it (`hook_output`).
- Where it is not, as in a checkpoint that runs the block without a graph: when the backward pass
  reaches anything else of the pass (`give_pending`).
- Where DistributedDataParallel waits for every parameter, the output of a closed block is connected
  to its parameters, so that autograd reaches them when it would reach an open branch
  (`connect_to_graph`). Under "freeze" they are None again at the end of the backward pass, unless
  autograd has reached them on another way (`_Reached`).
- Where a parameter has hooks on its gradient, as those of an optimizer that steps in the backward
  pass, or of `register_hook`, the output is connected in the same way, and autograd accumulates
  the zeros, so that the hooks run as they do for any other parameter.
- Where a parameter is itself computed, as the fast weights of MAML in `functional_call`, autograd
  passes the zeros on in the same way, to what it is computed from.
- Where no open branch and nothing else is trained, the output of the model is connected to them, so
  that the step has a graph (`with_closed_parameters`).

Parameters that several branches use are closed only where no open branch leads to them (`Routes`).
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.block import Block, Routes
from stochastic_depth.choices import SkippedPolicy
from stochastic_depth.tensors import computed_tensors_in, in_graph, replace_tensors, tensors_in
from stochastic_depth.torch_private import (
    at_end_of_backward,
    call_of,
    function_around,
    gradient_hooks,
    gradients_are_kept,
    is_compiled,
    is_transformed,
    never_traced,
    set_call,
    whole_call,
)


class ClosedGradients:
    """Gives the parameters of closed blocks their gradients, for one forward pass.

    Args:
        blocks: all blocks of the model.
        learns: for each block, whether gradients pass through its branch; otherwise it is closed.
        skipped: the gradients that the parameters of closed blocks get.
        in_ddp: whether DistributedDataParallel waits for a gradient of every parameter.
        routes: how gradients come to the blocks and their parameters.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        learns: Sequence[bool],
        skipped: SkippedPolicy,
        in_ddp: bool,
        routes: Routes,
    ) -> None:
        self._all_blocks, self._learns, self._routes = blocks, learns, routes
        self._blocks = [b for b, learning in zip(blocks, learns, strict=True) if not learning]
        self._in_ddp = in_ddp
        self._freezes = skipped == "freeze"
        self._thread = get_ident()
        self._observed: list[_ObservedCall] = []
        self._pending: dict[nn.Module, list[nn.Parameter]] = {}
        """By the module around it, the parameters of each closed block whose output was not found
        in the graph yet."""
        self._with_gradient: dict[nn.Module, bool] = {}
        """By module, whether a call of it may have a gradient; False under `torch.no_grad()`."""
        self._in_functions: set[nn.Module] = set()
        """The modules that were called in the forward pass of an `autograd.Function`."""
        self._unreached: list[nn.Parameter] = []
        """Parameters outside of the closed blocks that autograd does not reach either."""
        self._sparse: set[nn.Parameter] = set()
        self._hooked: set[nn.Parameter] = set()
        """Those of closed blocks whose zeros autograd accumulates, or passes on."""
        self._last_node: tuple[Any, int] | None = None
        """The autograd node of the last closed block's output, and the number of the node's
        result."""
        self._last_parameters: list[nn.Parameter] = []
        if in_ddp or not self._freezes:
            self._collect_pending()
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self._observe()

    def _collect_pending(self) -> None:
        """Collect the parameters of closed blocks now: FSDP replaces parameters while gathered."""
        reached = set[nn.Parameter]()
        if self._in_ddp and self._blocks:
            reached.update(self._routes.divide(self._learns)[0])
        for block in self._blocks:
            parameters = [p for p in block.trained() if p not in reached]
            if parameters:
                self._pending.setdefault(block.observed_module, []).extend(parameters)
                self._sparse.update(block.sparse_weights())
        if not self._freezes and not is_transformed():
            pending = (p for parameters in self._pending.values() for p in parameters)
            self._hooked.update(p for p in pending if not p.is_leaf or gradient_hooks(p))

    def _observe(self) -> None:
        """Observe the outputs of closed blocks, to know when a gradient reaches one of them.

        The call of each module is replaced, which costs less than a hook on the module.
        """
        for module in self._pending:
            if not is_compiled(module):
                observed = _ObservedCall(self, module, call_of(module))
                self._observed.append(observed)
                set_call(module, observed)

    @never_traced
    def hook_output(self, module: nn.Module, output: Any) -> Any:
        """Hook the graph at the output of a closed block; returns the output."""
        parameters = self._pending.get(module)
        if parameters is None or get_ident() != self._thread:
            return output
        # Whole: all of the output is in the graph, so that every gradient meets a hook.
        if type(output) is Tensor:
            tensors = [output] if output.grad_fn is not None else []
            is_whole = bool(tensors)
        else:
            tensors = in_graph(output)
            is_whole = bool(tensors) and len(tensors) == len(_differentiable(output))
        if not torch.is_grad_enabled() and _is_in_function():
            self._in_functions.add(module)
        if not is_whole:
            may_have_one = bool(tensors) or torch.is_grad_enabled() or module in self._in_functions
            self._with_gradient[module] = may_have_one or self._with_gradient.get(module, False)
        if is_whole and self._connects:
            output = self._connect(output, parameters)
            tensors = in_graph(output)
            is_whole = bool(tensors)  # not where a checkpoint runs the block without a graph
        for tensor in tensors:
            self._hook_node(tensor, parameters)
        if is_whole:  # otherwise the sum may be what is not in the graph
            del self._pending[module]
        return output

    def _hook_node(self, tensor: Tensor, parameters: list[nn.Parameter]) -> None:
        """Give these parameters their gradients when the backward pass reaches `tensor`."""
        node = tensor.grad_fn, tensor.output_nr
        if node == self._last_node:  # an identity shortcut: the previous closed block's output
            self._last_parameters.extend(parameters)
            return
        self._last_node, self._last_parameters = node, list(parameters)
        hook = partial(self._at_node, tensor.output_nr, self._last_parameters)
        node[0].register_prehook(hook)  # pyright: ignore[reportOptionalMemberAccess]

    def end_forward(self) -> None:
        """Stop observing outputs."""
        for observed in reversed(self._observed):
            observed.end()
        self._observed.clear()
        self._last_node, self._last_parameters = None, []
        if self._in_ddp and self._blocks:  # such a function passes a gradient on to its inputs
            blocks = zip(self._all_blocks, self._learns, strict=True)
            passes = [learns or b.observed_module in self._in_functions for b, learns in blocks]
            self._unreached = self._routes.divide(passes)[1]

    def with_closed_parameters(self, output: Any) -> Any:
        """`output`, whose graph also reaches the parameters of closed blocks.

        It is `output` itself where neither DDP nor autograd needs that.
        """
        if is_transformed():  # then gradients are returned, and not kept by parameters
            return output
        if self._connects:
            parameters = self._still_pending()
        elif any(tensor.grad_fn is not None for tensor in tensors_in(output)):
            return output
        else:
            parameters = [p for block in self._blocks for p in block.trained()]
        return self._connect(output, parameters)

    @property
    def _connects(self) -> bool:
        """Whether autograd has to reach the parameters of closed blocks."""
        return self._in_ddp or bool(self._hooked)

    def _connect(self, output: Any, parameters: Sequence[nn.Parameter]) -> Any:
        return connect_to_graph(output, parameters, self._accumulated)

    def _accumulated(self, parameter: nn.Parameter) -> Tensor | None:
        """The gradient that autograd accumulates for a parameter of a closed block."""
        return self._zeros(parameter) if parameter in self._hooked else None

    def _zeros(self, parameter: nn.Parameter) -> Tensor:
        layout = torch.sparse_coo if parameter in self._sparse else None
        return torch.zeros_like(parameter, layout=layout)

    def give_pending(self) -> None:
        """Give gradients to the parameters of blocks whose output was not found in the graph."""
        self._give(self._still_pending())

    def _still_pending(self) -> list[nn.Parameter]:
        pending = [
            parameter
            for module, parameters in self._pending.items()
            if self._with_gradient.get(module, True)
            for parameter in parameters
        ]
        return list(dict.fromkeys([*pending, *self._unreached]))

    def _at_node(
        self, number: int, parameters: Sequence[nn.Parameter], gradients: tuple[Tensor | None, ...]
    ) -> None:
        """Node pre-hook; gradients[number] is None if backward arrived through another output."""
        if gradients[number] is not None:
            self._give(parameters)

    def _give(self, parameters: Sequence[nn.Parameter]) -> None:
        """Set the missing gradients of `parameters` to zero.

        Under "freeze", those that autograd has not reached until the backward pass ends are missing
        again then.
        """
        without = [p for p in parameters if p.is_leaf and p.grad is None]
        if without and not gradients_are_kept():
            return
        for parameter in without:
            parameter.grad = self._zeros(parameter)
        if self._freezes and without:
            reached = [_Reached(parameter) for parameter in without]
            at_end_of_backward(partial(_clear, reached), after_others=True)


class _ObservedCall:
    """Replaces the call of a module whose output is observed."""

    __slots__ = ("before", "call", "gradients", "module")
    is_observer = True
    """So that `is_compiled` does not take it for compiled code."""

    def __init__(
        self, gradients: ClosedGradients, module: nn.Module, before: Callable[..., Any] | None
    ):
        self.gradients: ClosedGradients | None = gradients
        self.module, self.before = module, before
        """`before` is what replaced the call of the module before."""
        self.call = before or whole_call(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.call(*args, **kwargs)
        return output if self.gradients is None else self.gradients.hook_output(self.module, output)

    def end(self) -> None:
        """Stop observing; a different thread that has observed the module since then continues."""
        self.gradients = None
        now = call_of(self.module)
        if now is self:
            set_call(self.module, self.before)
            return
        while isinstance(now, _ObservedCall) and now.before is not self:
            now = now.before
        if isinstance(now, _ObservedCall):
            now.before, now.call = self.before, self.call


def connect_to_graph(
    output: Any,
    parameters: Sequence[nn.Parameter],
    gradient: Callable[[nn.Parameter], Tensor | None],
) -> Any:
    """`output`, with a graph in which autograd reaches each of `parameters`.

    `DistributedDataParallel`, and therefore `replicate`, ends a backward pass when autograd has
    reached every parameter. It never reaches those of a branch that did not run. Here the output of
    their block is connected to them, so that autograd reaches them when it would reach an open
    branch. That matters because DDP sends gradients in the order of its first backward pass.
    Returns `output` itself if no tensor in it can have a gradient.

    Args:
        gradient: the gradient that autograd finds for a parameter; None if it finds none.
    """
    tensors = _differentiable(output)
    tensors = in_graph(tensors) or tensors
    if not tensors or not parameters:
        return output
    new: dict[int, Tensor] = {}
    for tensor in tensors:  # one node for each: a loss may reach some of them only
        new[id(tensor)] = _ConnectToGraph.apply(gradient, tensor, *reversed(parameters))
    return replace_tensors(output, lambda tensor: new.get(id(tensor), tensor))


def _differentiable(output: Any) -> list[Tensor]:
    """The computed tensors in `output` that can have a gradient."""
    tensors = [t for t in computed_tensors_in(output) if not isinstance(t, nn.Parameter)]
    return [t for t in tensors if t.is_floating_point() or t.is_complex()]


def _is_in_function() -> bool:
    """Whether this runs in the forward pass of an `autograd.Function`, such as a checkpoint's.

    There the gradient mode does not say whether what is computed can have a gradient.
    """
    return function_around(sys._getframe(), checkpoints=True) is not None


class _ConnectToGraph(torch.autograd.Function):
    """The identity of a tensor, in whose graph `parameters` are too."""

    @staticmethod
    def forward(ctx: Any, gradient: Any, tensor: Tensor, *parameters: nn.Parameter) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.gradient, ctx.parameters = gradient, parameters
        # Not a view: a view that a custom function returns must not be changed in place.
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        missing = gradients[0] is None
        return (None, *gradients, *(None if missing else ctx.gradient(p) for p in ctx.parameters))


class _Reached:
    """Whether this backward pass gives a parameter a gradient, except by `_ConnectToGraph`."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter, self.reached = parameter, False
        self.hook = parameter.register_hook(self._note)

    def _note(self, gradient: Tensor | None) -> None:
        self.reached |= gradient is not None


def _clear(parameters: Sequence[_Reached]) -> None:
    for each in parameters:
        each.hook.remove()
        if not each.reached:
            each.parameter.grad = None
