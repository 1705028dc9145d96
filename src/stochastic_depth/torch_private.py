"""The private parts of PyTorch that this library uses, each with what could replace it.

The dictionaries in which `nn.Module` keeps its children, parameters and buffers are used directly
wherever they are needed, because there is no public way to read or set just these.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial, wraps
from inspect import unwrap
from types import CodeType, FrameType, GeneratorType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode  # the meta device, if it kept devices
from torch.autograd import Variable
from torch.distributed._composable.replicate import DDP as Replicated  # noqa: N811  # torch.distributed
from torch.fx import _symbolic_trace
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import (  # torch.utils, as its documentation already has it
    TorchDispatchMode,
)
from torch.utils._python_dispatch import _disable_current_modes as no_modes
from torch.utils._pytree import (  # torch.utils.pytree, which is not released yet
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_map_only,
    tree_unflatten,
)

__all__ = [
    "FakeTensorMode",
    "Replicated",
    "TorchDispatchMode",
    "at_end_of_backward",
    "backward_pass",
    "call_of",
    "changes_of",
    "frame_of_module_call",
    "function_around",
    "generators",
    "gradient_hooks",
    "gradients_are_kept",
    "in_ddp_forward",
    "is_called_by_compiled",
    "is_compiled",
    "is_compiler_error",
    "is_data_parallel_copy",
    "is_fx_tracing",
    "is_mapped",
    "is_sharded",
    "is_transformed",
    "never_traced",
    "next_node_number",
    "no_modes",
    "node_number",
    "norms",
    "outside_transforms",
    "recomputation",
    "set_call",
    "subclass_of",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_unflatten",
    "uncompiled",
    "unlogged_fake_tensors",
    "uses_replicate",
    "whole_call",
    "zero",
]

Call = Callable[..., Any]

# The backward pass.


def backward_pass() -> int | None:
    """A number that identifies the backward pass which runs in this thread, or None.

    A forward pass during a backward pass is a recomputation. Replacement: a public hook of
    `torch.utils.checkpoint` around recomputation.
    """
    number = torch._C._current_graph_task_id()
    return None if number == -1 else number


def node_number() -> int:
    """The number of the autograd node whose backward function runs in this thread.

    Each thread numbers nodes as it creates them. Replacement: as for `backward_pass`.
    """
    node: Any = torch._C._current_autograd_node()  # pyright: ignore[reportAttributeAccessIssue]
    return -1 if node is None else node._sequence_nr()


def next_node_number() -> int:
    """The number of the node that this thread creates next. Replacement: as for `backward_pass`."""
    if torch.compiler.is_compiling():  # the compiler cannot trace the call below
        return 0
    return torch.autograd._get_sequence_nr()  # pyright: ignore


def at_end_of_backward(act: Callable[[], Any], after_others: bool = False) -> None:
    """During a backward pass: call `act` when the pass has ended.

    Replacement: a public form of it, which PyTorch's own DDP and FSDP would use too.

    Args:
        after_others: whether to call it after all functions that other code queues.
    """
    engine = Variable._execution_engine
    engine.queue_callback(partial(engine.queue_callback, act) if after_others else act)


def recomputation(frame: FrameType) -> Callable[[], bool] | None:
    """For a frame of `torch.utils.checkpoint`: a function that returns whether it is recomputed.

    The answer is known only after the frame has ended. The result is None for any other frame.
    Replacement: as for `backward_pass`.
    """
    code = frame.f_code
    if code.co_filename != _CHECKPOINT:
        return None
    if code.co_name == "forward":  # the reentrant kind, which keeps only inputs
        return lambda: True
    generator = frame.f_locals.get("gen")  # of the other kind, between its two halves
    if not isinstance(generator, GeneratorType) or generator.gi_frame is None:
        return None
    kept = generator.gi_frame.f_locals.get("new_frame")
    return None if kept is None else lambda: len(kept.weak_holders) > 0


def function_around(frame: FrameType | None, checkpoints: bool = False) -> str | None:
    """The name of the `autograd.Function` in whose forward pass `frame` runs, or None.

    Such a function has its own backward pass, which recomputes without gates. Replacement: a public
    way to ask which function is running.

    Args:
        checkpoints: whether the functions of `torch.utils.checkpoint` count; they call modules
            again, which have their gates.
    """
    newest = torch.autograd.function.BackwardCFunction.__subclasses__()[-1]
    functions = _functions_by_forward(newest)
    while frame is not None:
        _, function = functions.get(id(frame.f_code), (None, None))
        is_checkpoint = function is not None and function.__module__ == "torch.utils.checkpoint"
        if function is not None and (checkpoints or not is_checkpoint):
            return function.__name__
        frame = frame.f_back
    return None


@lru_cache(maxsize=1)
def _functions_by_forward(newest: type) -> dict[int, tuple[CodeType, type]]:
    """Every `autograd.Function` with the code of its forward pass.

    Keyed by id(code), because hashing code is slow. Holding the code keeps its id from being
    reused.

    Args:
        newest: cache key: defining a new autograd.Function changes it.
    """
    found: dict[int, tuple[CodeType, type]] = {}
    for function in _subclasses(torch.autograd.Function):
        code = getattr(unwrap(function.forward), "__code__", None)  # pyright: ignore
        if code is not None:
            found.setdefault(id(code), (code, function))
    return found


def _subclasses(above: type) -> Iterator[type]:
    for below in type.__subclasses__(above):
        yield below
        yield from _subclasses(below)


_CHECKPOINT = torch.utils.checkpoint.__file__


def gradients_are_kept() -> bool:
    """Whether the current backward pass writes `.grad`: `loss.backward()`, not `autograd.grad`.

    The engine is asked whether it will run the nearest leaf of the graph. In `autograd.grad` it
    does not, or raises. With `backward(inputs=...)` the answer for that leaf is taken for all.
    Replacement: a public way to ask what kind of backward pass is running.
    """
    node: Any = torch._C._current_autograd_node()  # pyright: ignore[reportAttributeAccessIssue]
    level, seen = [node], {node}
    while level:
        below: list[Any] = []
        for node in level:
            if hasattr(node, "variable"):
                try:
                    return torch._C._will_engine_execute_node(node)
                except RuntimeError:
                    return False
            below += dict.fromkeys(n for n, _ in node.next_functions if n is not None)
        level = [node for node in dict.fromkeys(below) if node not in seen]
        seen.update(level)
    return True


def gradient_hooks(parameter: Tensor) -> list[dict[int, Any]]:
    """The hooks that run when autograd has computed, or accumulated, a gradient; may be changed.

    An optimizer that steps in the backward pass uses them, and noise that is added to gradients.
    Replacement: a public way to ask.

    Returns:
        The dictionaries of hooks that are not empty, each by key.
    """
    both = parameter._backward_hooks, parameter._post_accumulate_grad_hooks
    return [hooks for hooks in both if hooks]


def never_traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, excluded from torch.compile: a graph ends at its call.

    Replacement: `torch.compiler.disable`, if it did not load the compiler, which takes seconds.
    """
    torch_c: Any = torch._C
    frames = torch_c._dynamo.eval_frame
    swap = frames.set_eval_frame

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        compiler = swap(None)
        try:
            return function(*args, **kwargs)
        finally:
            swap(compiler)

    as_it_is: Any = call
    if hasattr(frames, "skip_code"):  # in older versions
        frames.skip_code(as_it_is.__code__)
    else:
        action = frames._FrameAction
        strategy = frames._FrameExecStrategy(action.SKIP, action.DEFAULT)
        frames.set_code_exec_strategy(as_it_is.__code__, strategy)
    as_it_is._torchdynamo_disable = True
    as_it_is._torchdynamo_disable_msg = (
        "stochastic depth draws and reads its gates outside of graphs: sd.compile_blocks(model) "
        "compiles the blocks of a model, instead of torch.compile(model)"
    )
    return as_it_is


# Data parallelism.


def in_ddp_forward() -> bool:
    """Whether a forward pass of `DistributedDataParallel` runs, which waits for all gradients.

    Replacement: `find_unused_parameters=True`, which costs a walk through the graph in every step;
    or a public way to tell DDP which parameters are unused.
    """
    return DistributedDataParallel._get_active_ddp_module() is not None


def uses_replicate(model: nn.Module) -> bool:
    """Whether `model` is under the composable `replicate`, whose own hook runs after ours."""
    return isinstance(model, Replicated)


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was called on `model`, or on a module inside it.

    FSDP takes seconds to import; if nothing has imported it, nothing is sharded.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(m, fsdp.FSDPModule) for m in model.modules())


def is_data_parallel_copy(model: nn.Module) -> bool:
    """Whether `model` is one of the copies that `nn.DataParallel` creates for each step.

    Replacement: none is needed once `nn.DataParallel` is gone, which PyTorch advises against.
    """
    return "_is_replica" in vars(model)


# Function transforms: torch.vmap, and those of torch.func.


def is_transformed() -> bool:
    """Whether a function transform is running. Replacement: a public way to ask."""
    return torch._C._are_functorch_transforms_active()


@contextmanager
def outside_transforms() -> Iterator[None]:
    """While entered, function transforms have no effect, so that tensors may be kept.

    Tensors created inside a transform must not outlive it. Replacement: a public form of it.
    """
    if not is_transformed():
        yield
        return
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with temporarily_clear_interpreter_stack():
        yield


def is_mapped(tensor: Tensor) -> bool:
    """Whether `tensor` is batched by vmap, so that its shape lacks that dimension.

    Replacement: a public way to ask.
    """
    torch_c: Any = torch._C
    functorch = torch_c._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


# Modules: what is called in place of a forward method and its hooks.
# Replacement: a public hook that can skip the wrapped call.

_CALL = "_compiled_call_impl"


def call_of(module: nn.Module) -> Call | None:
    """The function that is called in place of the module's forward method and hooks, or None."""
    return module.__dict__.get(_CALL)


def set_call(module: nn.Module, call: Call | None) -> None:
    """Set what is called in place of the forward method and hooks; None restores these."""
    if call is None:
        module.__dict__.pop(_CALL, None)
    else:
        module.__dict__[_CALL] = call


def frame_of_module_call() -> FrameType:
    """The frame of the module call that runs the hook in which this is called.

    Replacement: a hook that PyTorch calls when a forward pass ends with a KeyboardInterrupt too.
    """
    frame = sys._getframe(1)
    while frame.f_code.co_name != nn.Module._call_impl.__name__ and frame.f_back is not None:
        frame = frame.f_back
    return frame


def whole_call(module: nn.Module) -> Call:
    """The forward method of `module`, together with its hooks."""
    return module._call_impl


def is_compiled(module: nn.Module) -> bool:
    """Whether `module.compile()` was called. Replacement: a public property of modules."""
    call = call_of(module)
    return call is not None and not getattr(call, "is_observer", False)


@contextmanager
def uncompiled() -> Iterator[None]:
    """While entered, functions that the user compiles run uncompiled.

    The compiler bypasses hooks on modules, and would trace modes that see each function.
    """
    with ExitStack() as entered:
        if "torch._dynamo" in sys.modules:
            entered.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def is_called_by_compiled(frame: FrameType | None, calls: int = 0) -> bool:
    """Whether a function that torch.compile compiles runs between `frame` and a module call around.

    Replacement: a public way to ask whether what runs would be compiled.

    Args:
        calls: how many module calls around `frame` to pass before.
    """
    if "torch._dynamo" not in sys.modules:
        return False
    while frame is not None:
        code = frame.f_code
        if code is _CALL_OF_MODULE:
            if not calls:
                return False
            calls -= 1
        elif not calls and code.co_qualname.startswith("_TorchDynamoContext.__call__."):
            return True
        frame = frame.f_back
    return False


_CALL_OF_MODULE = nn.Module._call_impl.__code__


def is_compiler_error(error: BaseException) -> bool:
    """Whether torch.compile has raised it. Replacement: one public base class of these errors."""
    return type(error).__module__.startswith(("torch._dynamo.", "torch._inductor."))


def is_fx_tracing() -> bool:
    """Whether torch.fx traces what runs now. Under torch.compile and torch.export it may be True
    too, so ask `torch.compiler.is_compiling()` first.

    Replacement: `is_fx_symbolic_tracing`, where all versions have it and it is public.
    """
    return _symbolic_trace._is_fx_tracing_flag


def graph_exporter() -> str | None:
    """The function of PyTorch that records what runs now as a graph, or None.

    It is to be called outside of what torch.compile traces. Replacement: `torch.jit.is_tracing`,
    where it is typed as public; and `torch.compiler.is_exporting`, where all versions have it.
    """
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return "torch.jit.trace"
    return "torch.export" if torch.compiler.is_compiling() else None


# Random numbers.


def generators() -> list[torch.Generator]:
    """The random number generators of the CPU, and of CUDA, XPU and MPS where they are in use.

    `torch.manual_seed` also queues a seed for accelerators that are not in use yet, in place of the
    one that the user has queued, which could not be restored. Replacement: random states in
    `torch.accelerator`.
    """
    in_use: list[Any] = [each for each in (torch.cuda, torch.xpu) if each.is_initialized()]
    found = [torch.default_generator, *(one for each in in_use for one in each.default_generators)]
    if torch.backends.mps.is_available():
        found.append(torch.mps._get_default_mps_generator())
    return found


# Tensors.


def changes_of(tensor: Tensor) -> int:
    """How often `tensor` was changed in place. Replacement: the same, under a public name."""
    return tensor._version


def subclass_of(cls: type[Any], tensor: Tensor) -> Any:
    """A tensor of class `cls` over the same storage. Replacement: a faster `as_subclass`."""
    return Tensor._make_subclass(cls, tensor)


@contextmanager
def unlogged_fake_tensors() -> Iterator[None]:
    """Keep the errors of operators on fake tensors, which are raised as well, out of the log.

    Replacement: an option of `FakeTensorMode`.
    """
    log = logging.getLogger(FakeTensorMode.__module__)
    log.disabled, was = True, log.disabled
    try:
        yield
    finally:
        log.disabled = was


def zero(tensors: list[Tensor]) -> None:
    """Fill all of them with zeros in one call. Replacement: the same, documented as a beta."""
    torch._foreach_zero_(tensors)  # pyright: ignore[reportPrivateImportUsage]


def norms(tensors: list[Tensor], order: float) -> tuple[Tensor, ...]:
    """The norm of each, in one call. Replacement: the same, documented as a beta."""
    return torch._foreach_norm(tensors, order)  # pyright: ignore[reportPrivateImportUsage]
