"""Find the residual additions of a model by watching one forward pass.

A residual addition joins a value and something computed from it (an identity shortcut), or two
values computed from the same input of one module (a projection shortcut).
"""

import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from stochastic_depth.surgery.cuts import (
    Argument,
    Caller,
    Parameter,
    Place,
    Side,
    Sliced,
    Sum,
    methods_of,
)
from stochastic_depth.surgery.flops import CountFlops

ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}

MIXES = ("linear", "conv", "mm", "matmul", "einsum", "attention", "pool", "fft")
"""Parts of the names of functions of which a branch has at least one: what only adds to, scales or
bends a value (an activation written out, a rotary embedding, a normalisation) is no branch."""


@dataclass(frozen=True)
class Addition:
    """A residual addition, and the computation of its branch."""

    owner: str
    """Name of the module in which its branch begins: the one that adds, or one that calls it."""
    cuts: tuple[tuple[str, Sliced | None], ...]
    """Where to cut which modules, the one that adds first; None where that is in no method."""
    identity: bool
    """Whether the shortcut is the very value that the branch was computed from."""
    begins_elsewhere: bool
    """Whether not even the owner computes all of the branch."""
    modules: tuple[str, ...]
    """Names of the modules that ran for the branch, inside of the owner; one for each call."""
    parameters: frozenset[str]
    """Names of the parameters that the branch uses, inside of the owner."""
    flops: int
    """Of the branch, in one forward pass; 0 where they were not asked for."""
    whole: bool = False
    """Whether the owner returns this sum, and was given its shortcut as first argument."""


@dataclass
class _Call:
    """A module at work: the values it was given, and the first value made since it began."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: set[int]
    began: int


_Key = tuple[str, tuple[tuple[str, Sliced | None], ...]]
"""What tells additions apart: `owner` and `cuts`, before it is known what was idle."""

_Locals = dict[str, int | None]
"""Variables of a method: None, or the value of a tensor."""


_Method = tuple[Place | None, FrameType, FrameType | None]


@dataclass
class _Recorder(TorchFunctionMode):
    """Notes for every tensor what it was computed from, and every addition of two of them."""

    parents: list[tuple[int, ...]] = field(default_factory=list)
    made_by: list[str] = field(default_factory=list)
    flops: list[int] = field(default_factory=list)
    sums: dict[int, tuple[_Key, int]] = field(default_factory=dict)
    """Results of residual additions, and their shortcuts."""
    node_of: dict[int, int] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)
    parameters: dict[int, str] = field(default_factory=dict)
    calls: list[_Call] = field(default_factory=list)
    finished: list[tuple[_Call, set[int]]] = field(default_factory=list)
    children: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    """The values that were computed from each."""
    seen: defaultdict[_Key, list[tuple[int, list[list[_Locals]]]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """The result of each addition, and variables of all methods at work, cut by cut."""
    added: set[tuple[CodeType, int, int]] = field(default_factory=set)
    """Which expressions have added which values."""
    found: dict[_Key, Addition] = field(default_factory=dict)
    counter: CountFlops | None = None

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        operands = tuple(self.node(leaf) for leaf in _tensors((args, kwargs)))
        before = [args[i] if i < len(args) else None for i in range(2)]
        nodes = [self.node(x) if isinstance(x, Tensor) else None for x in before]
        shapes = [x.shape if isinstance(x, Tensor) else None for x in before]
        spent = self.spent()
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        for leaf in _tensors(out):
            self.new(leaf, operands, name, self.spent() - spent)
            spent = self.spent()
        left, right = nodes
        if (
            name in ADDITIONS
            and self.calls
            and left is not None
            and right is not None
            and left != right
            and shapes[0] == shapes[1]
        ):
            self.consider(left, right, self.node(out), sys._getframe(1))
        return out

    def spent(self) -> int:
        return 0 if self.counter is None else self.counter.total

    def node(self, tensor: Tensor) -> int:
        return self.node_of[id(tensor)] if id(tensor) in self.node_of else self.new(tensor, ())

    def new(
        self, tensor: Tensor, parents: tuple[int, ...], made_by: str = "", flops: int = 0
    ) -> int:
        self.parents.append(parents)
        self.flops.append(flops)
        self.made_by.append(made_by)
        self.kept.append(tensor)
        self.node_of[id(tensor)] = node = len(self.parents) - 1
        for parent in parents:
            self.children[parent].append(node)
        return node

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

    def consider(self, left: int, right: int, total: int, frame: FrameType | None) -> None:
        """Note the addition if it is residual."""
        call = self.calls[-1]
        again = self.added_again(left, right, frame)
        of = self.reaches(left, right, call)
        side = self.side_of_shortcut(left, right, of)
        if side is None:
            return
        kept = left if side == "left" else right
        identity = (left in of[1]) or (right in of[0])
        branch = of[1] - of[0] if side == "left" else of[0] - of[1]
        if not self.mixing(branch) or kept in again:
            return
        methods = list(methods_of(call.module, frame))
        cuts: list[tuple[str, Sliced | None]] = [(call.name, self.sum_of(methods, side, kept))]
        seen = [methods]
        handed = self.handed(call, branch, kept)
        for caller in reversed(self.calls[:-1]):
            if not handed:
                break
            methods = list(methods_of(caller.module, frame))
            place, callers = _places(methods)
            cuts.append((caller.name, place and Argument(place, handed, callers=callers)))
            seen.append(methods)
            call, of = caller, self.reaches(left, right, caller)
            branch = of[1] - of[0] if side == "left" else of[0] - of[1]
            handed = self.handed(call, branch, kept)
        modules = tuple(
            done.name
            for done, outputs in self.finished
            if done.began >= call.began and outputs and outputs <= branch
        )
        parameters = frozenset(
            self.parameters[id(self.kept[node])]
            for node in branch
            if id(self.kept[node]) in self.parameters
        )
        flops = sum(self.flops[node] for node in branch)
        key = (call.name, tuple(cuts))
        begins_elsewhere = bool(handed)
        before = self.found.get(key)
        if before is not None:
            modules += before.modules
            parameters |= before.parameters
            begins_elsewhere |= before.begins_elsewhere
            flops += before.flops
        self.found[key] = Addition(*key, identity, begins_elsewhere, modules, parameters, flops)
        self.sums[total] = key, kept
        self.seen[key].append((total, [self.idle_in(methods, branch) for methods in seen]))

    def added_again(self, left: int, right: int, frame: FrameType | None) -> set[int]:
        """Which of the two the same expression has added before: a bias that layers share."""
        assert frame is not None
        added = {(frame.f_code, frame.f_lasti, node) for node in (left, right)}
        again = added & self.added
        self.added |= added
        return {node for _, _, node in again}

    def sum_of(self, methods: list[_Method], side: Side, kept: int) -> Sum | None:
        """Where the innermost of `methods` adds, or calls a function that does."""
        place, callers = _places(methods)
        if place is None:
            return None
        function = methods[0][2]
        if function is None:
            return Sum(place, side, callers=callers)
        code = function.f_code
        for n, name in enumerate(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]):
            value = function.f_locals.get(name)
            if isinstance(value, Tensor) and self.node(value) == kept:
                position = n if n < code.co_argcount else None
                return Sum(place, side, (position, name), callers=callers)
        return None

    def idle_in(self, methods: list[_Method], branch: set[int]) -> list[_Locals]:
        """The variables of `methods` that are None, or that only the branch has used by now."""
        return [
            {
                name: None if value is None else self.node(value)
                for name, value in frame.f_locals.items()
                if value is None
                or (
                    isinstance(value, Tensor) and branch.issuperset(self.children[self.node(value)])
                )
            }
            for _, frame, _ in methods
        ]

    def additions(self, outputs: set[int]) -> list[Addition]:
        """What was found, with the variables that turned out to be idle.

        Args:
            outputs: of the model.
        """
        return [
            replace(addition, cuts=self.with_idle(key, outputs))
            for key, addition in self.found.items()
        ]

    def with_idle(self, key: _Key, outputs: set[int]) -> tuple[tuple[str, Sliced | None], ...]:
        def idle(cut: int, method: int) -> frozenset[str]:
            names: list[set[str]] = []
            for total, seen in self.seen[key]:
                variables = seen[cut][method] if method < len(seen[cut]) else {}
                unused = {
                    name
                    for name, node in variables.items()
                    if node is None
                    or (node not in outputs and max(self.children[node], default=0) < total)
                }
                names.append(unused)
            return frozenset(set.intersection(*names))

        def known(number: int, cut: Sliced | None) -> Sliced | None:
            if cut is None:
                return None
            callers = tuple(
                Caller(caller.place, idle(number, n)) for n, caller in enumerate(cut.callers, 1)
            )
            return replace(cut, idle=idle(number, 0), callers=callers)

        return tuple((name, known(n, cut)) for n, (name, cut) in enumerate(key[1]))

    def reaches(self, left: int, right: int, call: _Call) -> list[set[int]]:
        """What the two were computed from, no further back than what `call` was given."""
        earliest = min([call.began, *call.inputs])
        return [self.reach(left, earliest), self.reach(right, earliest)]

    def handed(self, call: _Call, branch: set[int], kept: int) -> tuple[Parameter, ...]:
        """The arguments of `call` that hold a part of the branch, computed before."""
        positional = [((n, None), value) for n, value in enumerate(call.args)]
        named = [((None, name), value) for name, value in call.kwargs.items()]
        return tuple(
            argument
            for argument, value in [*positional, *named]
            if any(
                node in branch and node < call.began and kept in self.reach(node, kept)
                for node in map(self.node, _tensors(value))
            )
        )

    def returned(self, call: _Call, output: Any) -> None:
        """Note what a module gave back."""
        outputs = {self.node(leaf) for leaf in _tensors(output)}
        self.finished.append((call, outputs))
        for node in outputs & self.sums.keys():
            key, kept = self.sums[node]
            given = call.args[0] if call.args else None
            if key[0] == call.name and isinstance(output, Tensor) and isinstance(given, Tensor):
                whole = self.node(given) == kept
                self.found[key] = replace(self.found[key], whole=whole)


def _places(methods: list[_Method]) -> tuple[Place | None, tuple[Caller, ...]]:
    """Where the innermost method stands, and where the others call it."""
    places = [place for place, _, _ in methods]
    known = list(itertools.takewhile(lambda place: place is not None, places))
    return (known[0] if known else None), tuple(Caller(place) for place in known[1:] if place)


def discover(
    model: nn.Module, run: Callable[[], object], count_flops: bool = False
) -> list[Addition]:
    """The residual additions of `model` in the order in which `run`, a forward pass, meets them.

    In training mode the pass updates statistics as any other: see `undisturbed`.
    """
    recorder = _Recorder(parameters={id(p): name for name, p in model.named_parameters()})
    with ExitStack() as entered:
        entered.enter_context(_calls_noted(model, recorder))
        entered.enter_context(torch.no_grad())
        if count_flops:
            recorder.counter = entered.enter_context(CountFlops())
        entered.enter_context(recorder)
        output = run()
    return recorder.additions({recorder.node(leaf) for leaf in _tensors(output)})


@contextmanager
def _calls_noted(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Keep `recorder.calls` the stack of modules at work."""
    handles = []
    for name, module in model.named_modules():

        def begin(module: nn.Module, args: tuple, kwargs: dict, name: str = name) -> None:
            inputs = {recorder.node(leaf) for leaf in _tensors((args, kwargs))}
            call = _Call(name, module, args, kwargs, inputs, len(recorder.parents))
            recorder.calls.append(call)

        def end(module: nn.Module, args: tuple, output: object) -> None:
            recorder.returned(recorder.calls.pop(), output)

        handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
        handles.append(module.register_forward_hook(end))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
