"""Save and restore the state of a model, and of the random number generators, around a pass."""

import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.torch_private import call_of, generators, gradient_hooks, set_call

_MODULE_ATTRIBUTES = frozenset(vars(nn.Module())) - {"training"}
"""Attributes of every `nn.Module`, which PyTorch itself manages: tensors, children and hooks."""


_HOOKS = tuple(name for name in vars(nn.Module()) if "hooks" in name)
"""The attributes of every `nn.Module` that hold its hooks."""


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """While entered, `model` is in evaluation mode; afterwards each module has its mode again."""
    was_training = model.training
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)  # a module may do more in it, as LoRA layers do
        for module, training in modes:
            module.training = training


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Restore `model` afterwards: modes, tensors, gradients, attributes, hooks; the random state.

    If a forward pass replaces a buffer or a parameter, the original tensor is restored, with its
    content. While this is entered, no module runs compiled, and PyTorch's own transformer layers do
    not use their fused path, because both bypass hooks and modes. Hooks on gradients, by which an
    optimizer may step during the backward pass, do not run.

    Yields:
        A function that restores the modules at once, so that another pass begins as the first did.
    """
    modules = list(model.modules())
    states = [_ModuleState(module) for module in modules]
    compiled = [(module, call_of(module)) for module in modules]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    fused = torch.backends.mha.get_fastpath_enabled()
    on_gradients = [hooks for p, _ in gradients for hooks in gradient_hooks(p)]
    held = [(hooks, dict(hooks)) for hooks in on_gradients]

    def restore() -> None:
        for state in states:
            state.restore()

    try:
        for hooks, _ in held:
            hooks.clear()
        for parameter, _ in gradients:
            parameter.grad = None
        for module, _ in compiled:
            set_call(module, None)
        torch.backends.mha.set_fastpath_enabled(False)
        with preserved_randomness():
            yield restore
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, implementation in compiled:
            set_call(module, implementation)
        restore()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for hooks, content in held:
            hooks.update(content)


@contextmanager
def preserved_randomness() -> Iterator[None]:
    """Restore the states of all random number generators: PyTorch's, Python's and NumPy's."""
    numpy = _numpy()
    of_torch = [(each, each.get_state()) for each in generators()]
    of_python = random.getstate()
    of_numpy = numpy.random.get_state() if numpy is not None else None
    try:
        yield
    finally:
        for each, state in of_torch:
            each.set_state(state)
        random.setstate(of_python)
        if numpy is not None:
            numpy.random.set_state(of_numpy)


def seed_everything(seed: int) -> None:
    """Seed all random number generators."""
    for each in generators():
        each.manual_seed(seed)
    random.seed(seed)
    numpy = _numpy()
    if numpy is not None:
        numpy.random.seed(seed)


def next_random_numbers(model: nn.Module) -> list[float]:
    """A number from each random number generator; they show whether as much was drawn before."""
    devices = {torch.device("cpu"), *(parameter.device for parameter in model.parameters())}
    of_torch = [torch.rand((), device=each).item() for each in sorted(devices, key=str)]
    numpy = _numpy()
    return [random.random(), *([] if numpy is None else [numpy.random.random()]), *of_torch]


class _ModuleState:
    """The state of one module, without its children."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.cls = module, type(module)
        self.scripted = isinstance(module, torch.jit.ScriptModule)
        self.training = module.training
        self.buffers: list[tuple[str, Any]] = []
        self.parameters: list[tuple[str, Any]] = []
        self.attributes: dict[str, Any] = {}
        self.hooks: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        containers: dict[int, Any] = {}
        if self.scripted:  # its dictionaries are not those of other modules
            held: list[Any] = list(module.buffers(recurse=False))
        else:
            self.buffers = list(module._buffers.items())
            self.parameters = list(module._parameters.items())
            self.attributes = _attributes(module)
            hooks = (vars(module).get(name) for name in _HOOKS)
            self.hooks = [(each, dict(each)) for each in hooks if isinstance(each, dict)]
            held = [tensor for _, tensor in (*self.buffers, *self.parameters)]
            held += _leaves(list(self.attributes.values()), containers)
        self.contents = [
            (each, each.detach().clone())
            for each in held
            if isinstance(each, Tensor) and has_content(each)
        ]
        self.containers = [
            (value, dict(value) if isinstance(value, dict) else list(value))
            for value in containers.values()
        ]

    def restore(self) -> None:
        self.module.training = self.training
        if not self.scripted and type(self.module) is self.cls:  # a lazy module changes its class
            attributes = vars(self.module)
            for name in _attributes(self.module).keys() - self.attributes.keys():
                del attributes[name]
            attributes.update(self.attributes)
            _put_back(self.module._buffers, self.buffers)
            _put_back(self.module._parameters, self.parameters)
        with torch.no_grad():
            for tensor, content in self.contents:
                if not torch.equal(tensor, content):
                    tensor.copy_(content)
        for hooks, content in self.hooks:
            if hooks.keys() != content.keys():
                hooks.clear()
                hooks.update(content)
        for value, content in self.containers:
            if _is_same(value, content):
                continue
            value.clear()
            if isinstance(value, dict | set):
                value.update(content)
            else:
                value.extend(content)


def _numpy() -> Any:
    """NumPy, if anything has imported it."""
    return sys.modules.get("numpy")


COLLECTIONS = (list, set, dict, deque, OrderedDict, defaultdict, Counter)


def _leaves(value: object, containers: dict[int, Any], objects: int = 2) -> Iterator[object]:
    """All that is in nested tuples and containers, which are added to `containers` by id.

    Args:
        objects: how many levels of objects are looked into, whose attributes are a dict.
    """
    inside: Any = value
    if objects and type(value) not in COLLECTIONS and is_object(value):
        inside, objects = vars(value), objects - 1
    if type(inside) in COLLECTIONS and id(inside) not in containers:
        containers[id(inside)] = inside
    elif type(inside) is not tuple:
        yield value
        return
    for each in list(inside.values() if isinstance(inside, dict) else inside):
        yield from _leaves(each, containers, objects)


def is_object(value: object) -> bool:
    """Whether `value` is an object of the model's author with attributes, such as a counter."""
    library = type(value).__module__.partition(".")[0]
    attributes = getattr(value, "__dict__", None)
    if type(attributes) is not dict or library in ("torch", "stochastic_depth", "logging"):
        return False
    return not isinstance(value, (Tensor, nn.Module, type, ModuleType)) and not callable(value)


def _is_same(value: Any, content: Any) -> bool:
    """Whether a container still has the same elements, in the same order."""
    pairs = zip(value, content, strict=False)
    if isinstance(value, dict):
        pairs = zip(value.items(), content.items(), strict=False)
        return len(value) == len(content) and all(
            one is key and mine is other for (one, mine), (key, other) in pairs
        )
    return len(value) == len(content) and all(one is other for one, other in pairs)


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _MODULE_ATTRIBUTES}


def _put_back(now: dict[str, Any], kept: list[tuple[str, Any]]) -> None:
    """Make `now` contain exactly the objects that `kept` lists, by name."""
    if len(now) != len(kept) or any(now.get(name) is not value for name, value in kept):
        now.clear()
        now.update(kept)


def has_content(tensor: Tensor) -> bool:
    """Whether `tensor` is a plain tensor with values: not on the meta device, sharded or sparse."""
    plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
    return plain and tensor.device.type != "meta" and tensor.layout == torch.strided
