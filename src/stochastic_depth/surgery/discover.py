"""Find the residual additions of a model by watching one forward pass.

A residual addition joins a value and something computed from it (an identity shortcut), or two
values computed from the same input of one module (a projection shortcut).
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}

MIXES = ("linear", "conv", "mm", "matmul", "einsum", "attention", "pool", "fft")
"""Parts of the names of functions of which a branch has at least one: what only adds to, scales or
bends a value (an activation written out, a rotary embedding, a normalisation) is no branch."""

Side = Literal["left", "right"]
Position = tuple[int, int, int, int]
"""First and last line of an expression in its file, first and last column."""


@dataclass(frozen=True)
class Site:
    """Where a residual addition stands in the source, and which operand is its shortcut."""

    kind: type[nn.Module]
    """The class that defines the method: that of the module that adds, or a parent."""
    method: str
    position: Position
    shortcut: Side

    def __str__(self) -> str:
        return f"{self.kind.__qualname__}.{self.method}, line {self.position[0]}"


@dataclass(frozen=True)
class Addition:
    """A residual addition of one module."""

    owner: str
    """Name of the module whose method adds."""
    site: Site | None
    """None where it is not in a method of its module, but in a function that a method calls."""
    identity: bool
    """Whether the shortcut is the very value that the branch was computed from."""
    elsewhere: bool
    """Whether a part of the branch was computed outside of the module."""
    modules: tuple[str, ...]
    """Names of the modules that ran for the branch, inside of the owner; one for each call."""
    parameters: frozenset[str]
    """Names of the parameters that the branch uses, inside of the owner."""


@dataclass
class _Call:
    """A module at work: the values it was given, and the first value made since it began."""

    name: str
    module: nn.Module
    inputs: set[int]
    began: int


@dataclass
class _Recorder(TorchFunctionMode):
    """Notes for every tensor what it was computed from, and every addition of two of them."""

    parents: list[tuple[int, ...]] = field(default_factory=list)
    made_by: list[str] = field(default_factory=list)
    sums: set[int] = field(default_factory=set)
    node_of: dict[int, int] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)
    parameters: dict[int, str] = field(default_factory=dict)
    calls: list[_Call] = field(default_factory=list)
    finished: list[tuple[_Call, set[int]]] = field(default_factory=list)
    found: dict[tuple[str, Site | None], Addition] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        operands = tuple(self.node(leaf) for leaf in _tensors((args, kwargs)))
        before = [args[i] if i < len(args) else None for i in range(2)]
        nodes = [self.node(x) if isinstance(x, Tensor) else None for x in before]
        shapes = [x.shape if isinstance(x, Tensor) else None for x in before]
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        for leaf in _tensors(out):
            self.new(leaf, operands, name)
        left, right = nodes
        if (
            name in ADDITIONS
            and self.calls
            and left is not None
            and right is not None
            and left != right
            and shapes[0] == shapes[1]
        ) and self.consider(left, right, sys._getframe(1)):
            self.sums.add(self.node(out))
        return out

    def node(self, tensor: Tensor) -> int:
        return self.node_of[id(tensor)] if id(tensor) in self.node_of else self.new(tensor, ())

    def new(self, tensor: Tensor, parents: tuple[int, ...], made_by: str = "") -> int:
        self.parents.append(parents)
        self.made_by.append(made_by)
        self.kept.append(tensor)
        self.node_of[id(tensor)] = len(self.parents) - 1
        return len(self.parents) - 1

    def reach(self, node: int, until: int) -> set[int]:
        """What `node` was computed from, itself included, no further back than value `until`."""
        seen, open_nodes = {node}, [node]
        while open_nodes:
            for parent in self.parents[open_nodes.pop()]:
                if parent >= until and parent not in seen:
                    seen.add(parent)
                    open_nodes.append(parent)
        return seen

    def mixing(self, nodes: set[int]) -> list[str]:
        """The functions among those that made `nodes` of which a branch has at least one."""
        return [self.made_by[n] for n in nodes if any(part in self.made_by[n] for part in MIXES)]

    def convolving(self, nodes: set[int]) -> int:
        """How many of `nodes` were made by a function with weights."""
        return sum("pool" not in name for name in self.mixing(nodes))

    def is_projection(self, shortcut: set[int], branch: set[int]) -> bool:
        """Whether one operand is a projection of a single value from which the other starts too.

        A highway's carry, (1 - t(x)) * x, is computed from two values. A projection convolves once
        at most, and less often than the branch: parallel branches are none of each other.
        """
        shared = shortcut & branch
        own = shortcut - shared
        starts = {p for node in own for p in self.parents[node] if p in shared}
        convolutions = self.convolving(own)
        return len(starts) == 1 and convolutions <= 1 and convolutions < self.convolving(branch)

    def side_of_shortcut(self, left: int, right: int, of: list[set[int]]) -> Side | None:
        """Which operand is the shortcut, if the addition is residual."""
        call = self.calls[-1]
        if left in of[1]:
            return "left"
        if right in of[0]:
            return "right"
        if not (call.inputs & of[0] and call.inputs & of[1]):
            return None
        if (left in self.sums) != (right in self.sums):  # x + f(x) + g(x)
            return "left" if left in self.sums else "right"
        made = [sum(node >= call.began for node in nodes) for nodes in of]
        if made[0] < made[1] and self.is_projection(of[0], of[1]):
            return "left"
        if made[1] < made[0] and self.is_projection(of[1], of[0]):
            return "right"
        return None

    def consider(self, left: int, right: int, frame: FrameType | None) -> bool:
        """Note the addition if it is residual."""
        call = self.calls[-1]
        earliest = min([call.began, *call.inputs])
        of = [self.reach(left, earliest), self.reach(right, earliest)]
        shortcut = self.side_of_shortcut(left, right, of)
        if shortcut is None:
            return False
        branch = of[1] - of[0] if shortcut == "left" else of[0] - of[1]
        identity = (left in of[1]) or (right in of[0])
        if not self.mixing(branch):
            return False
        site = find_site(call.module, frame, shortcut)
        kept = left if shortcut == "left" else right
        modules = tuple(
            done.name
            for done, outputs in self.finished
            if done.began >= call.began and outputs and outputs <= branch
        )
        parameters = {
            self.parameters[id(self.kept[node])]
            for node in branch
            if id(self.kept[node]) in self.parameters
        }
        elsewhere = any(
            node in branch and node < call.began and kept in self.reach(node, kept)
            for node in call.inputs
        )
        before = self.found.get((call.name, site))
        if before is not None:
            modules += before.modules
            parameters |= before.parameters
            elsewhere |= before.elsewhere
        self.found[call.name, site] = Addition(
            call.name, site, identity, elsewhere, modules, frozenset(parameters)
        )
        return True


def discover(model: nn.Module, run: Callable[[], object]) -> list[Addition]:
    """The residual additions of `model` in the order in which `run`, a forward pass, meets them.

    In training mode the pass updates statistics as any other: see `undisturbed`.
    """
    recorder = _Recorder(parameters={id(p): name for name, p in model.named_parameters()})
    with _calls_noted(model, recorder), torch.no_grad(), recorder:
        run()
    return list(recorder.found.values())


@contextmanager
def _calls_noted(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Keep `recorder.calls` the stack of modules at work."""
    handles = []
    for name, module in model.named_modules():

        def begin(module: nn.Module, args: tuple, kwargs: dict, name: str = name) -> None:
            inputs = {recorder.node(leaf) for leaf in _tensors((args, kwargs))}
            recorder.calls.append(_Call(name, module, inputs, len(recorder.parents)))

        def end(module: nn.Module, args: tuple, output: object) -> None:
            outputs = {recorder.node(leaf) for leaf in _tensors(output)}
            recorder.finished.append((recorder.calls.pop(), outputs))

        handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
        handles.append(module.register_forward_hook(end))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def find_site(module: nn.Module, frame: FrameType | None, shortcut: Side) -> Site | None:
    """The expression in a method of `module` that is being evaluated."""
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and frame.f_locals.get(code.co_varnames[0]) is module:
            position = list(code.co_positions())[frame.f_lasti // 2]
            for kind in type(module).__mro__:
                method = vars(kind).get(code.co_name)
                inner = inspect.unwrap(method) if callable(method) else None
                if getattr(inner, "__code__", None) is code and None not in position:
                    first, last, start, end = position
                    return Site(kind, code.co_name, (first, last, start, end), shortcut)  # type: ignore[arg-type]
            return None
        frame = frame.f_back
    return None
