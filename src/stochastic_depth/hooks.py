"""Hooks around the forward and the backward pass of a model with stochastic depth.

A gate belongs to the forward pass that it was drawn for. When that pass is over, no gate is in
force. When its backward pass recomputes a block, the block gets the gate of that forward pass. This
holds in evaluation too, because schedules and forced gates change what a block does there.
"""

import sys
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.block import Block, Routes, set_evaluation_gates, set_training_gates
from stochastic_depth.closed_gradients import ClosedGradients
from stochastic_depth.errors import GateError
from stochastic_depth.gates import Gate
from stochastic_depth.handle import Handle
from stochastic_depth.module_snapshot import GateReaders
from stochastic_depth.tensors import tensors_in
from stochastic_depth.torch_private import (
    at_end_of_backward,
    backward_pass,
    frame_of_module_call,
    in_ddp_forward,
    is_compiled,
    is_data_parallel_copy,
    is_mapped,
    never_traced,
    next_node_number,
    node_number,
    outside_transforms,
    tree_leaves,
    uses_replicate,
)

_RECENT_PASSES = 64
"""How many of the latest forward passes are kept even if their outputs are not."""


class ForwardHooks:
    """Hooks on a model that draw its gates when a forward pass begins in training mode.

    In the backward pass of that forward pass, recomputed blocks have the same gates, and the
    parameters of closed blocks get the gradient that `handle.skipped` asks for.
    """

    def __init__(self, model: nn.Module, handle: Handle, routes: Routes) -> None:
        self.handle, self.blocks, self.routes = handle, handle.blocks, routes
        self._gate_readers = GateReaders(model, handle.blocks)
        handle.passes = self
        self._stack: list[_ModelCall] = []
        """The running calls of the model, innermost last."""
        self._passes: list[weakref.ref[ForwardPass]] = []
        """Passes that may still have a backward pass; their outputs keep them alive."""
        self._recent: deque[ForwardPass] = deque(maxlen=_RECENT_PASSES)
        self._in_backward: dict[int, ForwardPass] = {}
        """For each running backward pass, the forward pass whose graph it has reached."""

    @never_traced
    def before_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Hook on the model: draw gates, unless this is evaluation or a recomputation."""
        call = self._enter(frame_of_module_call())
        self._gate_readers.warn_of_replaced(model)
        if not (model.training or any(block.is_training for block in self.blocks)):
            self._begin_evaluation(call)
        elif is_data_parallel_copy(model):
            raise GateError(
                "nn.DataParallel runs copies of the model in threads, which would draw different "
                "gates: use torch.nn.parallel.DistributedDataParallel, one process for each GPU "
                "(torchrun), or one GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        elif backward_pass() is not None:
            self._begin_recomputation(call)
        else:
            self._refuse_threads()
            batch = None if self.handle.gate == "batch" else batch_size((args, kwargs))
            with outside_transforms():
                gates = self.handle.next_gates(batch)
            self._begin(call, gates, uses_replicate(model))

    def _begin_evaluation(self, call: "_ModelCall") -> None:
        """Begin a pass in evaluation, which may have a backward pass too."""
        differentiable = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if differentiable and backward_pass() is None:
            self._begin(call, None, replicated=False)
        else:
            self._notify_observers(None)

    def _begin_recomputation(self, call: "_ModelCall") -> None:
        """Begin a pass that a backward pass recomputes, under the gates that it had."""
        again = self._pass_of_backward()
        if again is None or again.gates is None:
            raise GateError(
                "the model is called in training mode within a backward pass, and it is "
                "not known which of its forward passes is recomputed there: use "
                "checkpoint(..., use_reentrant=False)"
            )
        again.backward_begins()
        call.recomputed = again
        set_training_gates(self.blocks, again.gates)

    @never_traced
    def after_forward(self, model: nn.Module, args: tuple, output: Any) -> Any:
        """Hook on the model; it is also called if the forward pass has failed."""
        frame = frame_of_module_call()
        call = next((each for each in self._stack if each.frame is frame), None)
        if call is None:  # a hook before ours has failed
            return output
        gates = call.gates or ()
        trained = bool(gates) and torch.is_grad_enabled()
        # `generate` in training mode draws other gates for each token, without gradients.
        lacks = any(not gate.open or gate.samples is not None for gate in gates)
        output = self._end(call, output)
        if trained or lacks or self.handle.is_subnetwork:
            refuse_cache(output)
        return output

    @contextmanager
    def forward_pass(self, gates: list[Gate]) -> Iterator[None]:
        """While entered, the blocks have these gates, as in a forward pass of the model."""
        self._refuse_threads()
        call = self._enter(None)
        self._begin(call, gates, replicated=False)
        try:
            yield
        finally:
            self._end(call, None)

    def _enter(self, frame: FrameType | None) -> "_ModelCall":
        """Note that a forward pass begins, and forget passes that have been interrupted.

        PyTorch calls no hook when a forward pass ends with a KeyboardInterrupt.
        """
        call = _ModelCall(frame, get_ident())
        self._forget([each for each in self._stack if not each.is_running()])
        self._stack.append(call)
        return call

    def _forget(self, interrupted: "Sequence[_ModelCall]") -> None:
        """Remove passes that have been interrupted, and what they have set up, innermost first."""
        for each in reversed(interrupted):
            self._stack.remove(each)
            if each.begun is not None:
                each.begun.interrupt()

    def _refuse_threads(self) -> None:
        """Raise `GateError` if a different thread is in a forward pass."""
        if any(each.gates is not None and each.thread != get_ident() for each in self._stack):
            raise GateError(
                "the model is called in training mode from two threads at once, but it has gates "
                "for one pass at a time: call it from one thread, or give each thread a copy "
                "(copy.deepcopy(model))"
            )

    def running_gates(self) -> list[Gate] | None:
        """The gates of the innermost running forward pass that has drawn gates, or None."""
        return next((each.gates for each in reversed(self._stack) if each.gates), None)

    def _begin(self, call: "_ModelCall", gates: list[Gate] | None, replicated: bool) -> None:
        """Begin a forward pass under these gates; None in evaluation."""
        self.let_blocks_recall()
        if gates is not None:
            self._in_backward.clear()  # a backward pass that failed may have left an entry
        mine = (each.begun for each in reversed(self._stack) if each.thread == call.thread)
        outer = next(filter(None, mine), None)
        in_ddp = gates is not None and (replicated or in_ddp_forward())
        call.begun = begun = ForwardPass(self, gates, in_ddp, outer)
        self._recent.append(begun)
        self._passes.append(weakref.ref(begun, self._passes.remove))
        if gates is not None:
            set_training_gates(self.blocks, gates)
        self._notify_observers(gates)

    def _notify_observers(self, gates: list[Gate] | None) -> None:
        """Call the observers of the handle; `gates` is None in evaluation."""
        for observe in self.handle.observers:
            observe(gates)

    def _end(self, call: "_ModelCall", output: Any) -> Any:
        """End a pass, and those within it that have been interrupted."""
        inside = self._stack[self._stack.index(call) + 1 :]
        self._forget([each for each in inside if each.thread == call.thread])
        self._stack.remove(call)
        ended = call.begun
        self.handle.restore_gates()
        if ended is not None:
            return ended.end(output)
        if call.recomputed is not None:
            return call.recomputed.with_closed_parameters(output)
        return output

    def let_blocks_recall(self) -> None:
        """Let the blocks ask, when they are recomputed, which gates their forward pass had."""
        if self.blocks[0].gates[0].recall is not None:
            return
        for number, block in enumerate(self.blocks):  # also in a copy, whose blocks have lost it
            for addition in block.gates:
                addition.recall = partial(self._recall, number)

    def _recall(self, number: int, training: bool) -> Gate | None:
        """In a backward pass: the gate of block `number` in the forward pass that is recomputed
        there, or None if that is not known."""
        again = self._pass_of_backward()
        if again is None:
            thread, since = self.handle.evaluation_since
            if not training and thread == get_ident() and 0 <= node_number() < since:
                raise GateError(
                    f"block {self.blocks[number].name!r} is recomputed in evaluation mode, but "
                    "what it does there has changed since its forward pass (by handle.forced, "
                    "handle.subnetwork or a schedule), and it is not known which forward pass that "
                    "was: call loss.backward() before that changes, within the context; or call "
                    "the whole model, with checkpoint(..., use_reentrant=False)"
                )
            return None
        again.backward_begins()
        mode = again.modes[number]
        gates = again.gates if (training if mode is None else mode) else again.evaluation
        return None if gates is None else gates[number]

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

        Each thread numbers its own nodes. The result is None if the number fits several passes:
        those of two threads, or those inside one reentrant checkpoint.
        """
        passes = [each for ref in list(self._passes) if (each := ref()) is not None]
        creators = [each for each in passes if each.first_node <= node < each.end_node]
        if creators:
            return _only([p for p in creators if not any(p is other.outer for other in creators)])
        enclosed = [each for each in passes if each.first_node == node + 1]
        checkpointed = [each for each in enclosed if each.first_node == each.end_node]
        return _only(checkpointed or enclosed)

    def entered_backward(self, of: "ForwardPass") -> bool:
        """Record that the backward pass has reached `of`; returns False if it had before."""
        backward = backward_pass()
        if backward is None or self._in_backward.get(backward) is of:
            return False
        if backward not in self._in_backward:
            at_end_of_backward(partial(self._in_backward.pop, backward, None))
        self._in_backward[backward] = of
        return True

    def __getstate__(self) -> dict[str, Any]:  # a copy has no running passes
        nothing: dict[str, Any] = {"_stack": [], "_passes": [], "_in_backward": {}}
        return {**self.__dict__, **nothing, "_recent": deque(maxlen=_RECENT_PASSES)}


@dataclass(eq=False)
class _ModelCall:
    """A running forward pass of the model, or a context of `Handle.draw`."""

    frame: FrameType | None
    """The frame of the call of the model; None for a context, which always ends."""
    thread: int
    begun: "ForwardPass | None" = None
    """The pass that began here; None in a recomputation, and in evaluation without gradients."""
    recomputed: "ForwardPass | None" = None
    """The pass that is recomputed here, in a backward pass."""

    @property
    def gates(self) -> list[Gate] | None:
        """The gates that were drawn for it; None in evaluation and in a recomputation."""
        return None if self.begun is None else self.begun.gates

    def is_running(self) -> bool:
        """Whether it was not interrupted."""
        if self.frame is None:
            return True
        frame = sys._current_frames().get(self.thread)
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None


class ForwardPass:
    """One forward pass: its gates, and what happens when its backward pass begins."""

    def __init__(
        self,
        hooks: ForwardHooks,
        gates: list[Gate] | None,
        in_ddp: bool,
        outer: "ForwardPass | None",
    ) -> None:
        self._hooks, self.gates = hooks, gates
        self.evaluation = [block.evaluation_gate for block in hooks.blocks]
        """What the blocks do that are in evaluation mode; in evaluation `gates` is None."""
        self.modes = [_mode(block) for block in hooks.blocks]
        """Whether each block is in training mode; None if only a part of it is."""
        self.outer = outer
        """The running forward pass within which this one began."""
        self.first_node = self.end_node = next_node_number()
        """The pass makes the autograd nodes numbered from `first_node` to below `end_node`."""
        # A block that is closed here may have a gradient from another process.
        skipped = "paper" if in_ddp and hooks.handle.differs_by_rank else hooks.handle.skipped
        learns = [True] * len(hooks.blocks) if gates is None else [gate.learns for gate in gates]
        self._closed_gradients = ClosedGradients(
            hooks.blocks, learns, skipped, in_ddp, hooks.routes
        )

    def end(self, output: Any) -> Any:
        """End the pass; returns its output, connected to closed branches where that is needed."""
        self._closed_gradients.end_forward()
        if torch.is_grad_enabled() and output is not None:
            output = self.with_closed_parameters(output)
            for tensor in tensors_in(output):
                if tensor.grad_fn is not None:  # a hook on a leaf would never be removed
                    tensor.register_hook(self.backward_begins)
        self.end_node = next_node_number()
        return output

    def with_closed_parameters(self, output: Any) -> Any:
        """`output`, whose graph also reaches closed branches where DDP or autograd needs them.

        A reentrant checkpoint around the model computes its first output without a graph, so only
        the output that it recomputes can be connected to the branches.
        """
        return self._closed_gradients.with_closed_parameters(output)

    def interrupt(self) -> None:
        """End a pass that PyTorch has not ended, as after a KeyboardInterrupt."""
        self._closed_gradients.end_forward()

    def backward_begins(self, _: Tensor | None = None) -> None:
        """Hook: a backward pass has reached a tensor that this pass has computed."""
        if not self._hooks.entered_backward(self):
            return
        self._closed_gradients.give_pending()
        if any(is_compiled(block.module) for block in self._hooks.blocks):
            # Compiled code reads the gates that are in force.
            blocks, handle = self._hooks.blocks, self._hooks.handle
            set_training_gates(blocks, self.gates or [None] * len(blocks))
            set_evaluation_gates(blocks, self.evaluation)
            at_end_of_backward(handle.restore_gates)
            at_end_of_backward(handle.restore_evaluation_gates)


def _mode(block: Block) -> bool | None:
    modes = {module.training for module in block.gate_readers}
    return modes.pop() if len(modes) == 1 else None


def _only(passes: Sequence[ForwardPass]) -> ForwardPass | None:
    """The single pass of a list; None where there is no pass, or more than one."""
    return passes[0] if len(passes) == 1 else None


def refuse_cache(output: object) -> None:
    """Raise `GateError` if a model with closed blocks returns a key/value cache."""
    if getattr(output, "past_key_values", None) is not None:
        raise GateError(
            "the model returns past_key_values, a cache to which closed blocks add no entries: "
            "call it with use_cache=False, or set config.use_cache = False in the model and in "
            "each part that has a config of its own, as the decoder of T5 has; to generate, call "
            "model.eval() first"
        )


def batch_size(inputs: object) -> int:
    """The number of samples in the inputs of a model: the length of the first tensor among them.

    Raises:
        GateError: when there is no tensor.
    """
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor) and is_mapped(leaf):
            raise GateError(
                "the model is called within torch.vmap, which hides the batch dimension that gates "
                'for single samples need: use gate="batch", whose gates all samples share'
            )
        if isinstance(leaf, Tensor) and leaf.ndim > 0:
            return len(leaf)
    raise GateError(
        "gates for single samples need a tensor [batch, ...] among the model's inputs, but no "
        'input is a tensor: use gate="batch"'
    )
