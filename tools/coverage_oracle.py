"""An own account of a model's residual additions, which shares no code with the library.

A forward pass of the original model is watched function by function. An addition is residual when
one operand was computed from the other and something in between mixes (a product, a convolution,
attention, a recurrence, pooling). Closed, it gives its shortcut: the rest of the model is as it is.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ADDS = ("add", "add_", "__add__", "__radd__", "__iadd__", "addcmul", "addcmul_")
MIXES = (
    "linear conv mm matmul bilinear einsum attention lstm gru rnn pool fft scatter index_add "
    "unknown"
).split()
RESIZES = ("conv_transpose", "interpolate", "upsample", "pixel_shuffle")
RANDOM = ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "dropout_")


@dataclass
class Value:
    """A tensor of the pass: what it was computed from, by what, and in which module."""

    ancestors: int
    """A bit for each value, itself among them."""
    parents: tuple[int, ...]
    function: str
    module: str


@dataclass(frozen=True)
class Addition:
    """The number of an addition in the pass, and which operand goes by."""

    number: int
    side: int
    identity: bool
    inside: frozenset[int]
    """Values of the branch that were computed from the shortcut."""
    modules: frozenset[str]
    """In which they were computed; a projection's: all of the branch."""
    owner: str
    last: str
    """The module in which what is added was computed."""
    resizes: bool
    """Whether its branch makes anything larger, as those of long skip connections do."""
    is_bias: bool
    """Whether its shortcut is added in several layers alike, as an embedding of positions is."""


@dataclass
class Watch(TorchFunctionMode):
    """Counts additions, makes dropout the identity, and closes or watches what it is told to."""

    closed: Mapping[int, int] = field(default_factory=dict)
    """The side that goes by, by number of the addition."""
    model: nn.Module | None = None
    """Watched if given."""

    def __post_init__(self) -> None:
        super().__init__()
        self.count = 0
        self.values: list[Value] = []
        self.ids: dict[int, int] = {}
        self.kept: list[Any] = []
        self.stack: list[str] = [""]
        self.additions: list[tuple[int, int, int, int]] = []
        """Number, left, right and result."""
        self.owners: dict[int, str] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in RANDOM and args and isinstance(args[0], Tensor):
            return args[0]
        for dropout in ("dropout_p", "dropout"):
            if isinstance(kwargs.get(dropout), float):
                kwargs[dropout] = 0.0
        adds = name in ADDS and len(args) >= 2 and all(isinstance(a, Tensor) for a in args[:2])
        number, self.count = self.count, self.count + adds
        if adds and number in self.closed:
            by = args[self.closed[number]].clone()
            return args[0].copy_(by) if name in ("add_", "__iadd__", "addcmul_") else by
        watched = self.model is not None
        parents = [self.value(t) for t in tensors((args, kwargs))] if watched else []
        out = func(*args, **kwargs)
        if watched and name != "__set__":
            changed = args[0] if name == "__setitem__" else out
            for tensor in tensors(changed):
                if self.ids.get(id(tensor)) is None or changes(name) or name in ADDS:
                    self.note(tensor, parents, name)
            if adds and args[0].shape == args[1].shape and args[0].numel() > 1:
                self.additions.append((number, parents[0], max(parents[1:]), self.value(out)))
                self.owners[number] = self.stack[-1]
        return out

    def value(self, tensor: Tensor) -> int:
        """The number of a value; a new one without ancestors where it was not seen to be made."""
        number = self.ids.get(id(tensor))
        return self.note(tensor, (), "given") if number is None else number

    def note(self, tensor: Tensor, parents: Any, function: str) -> int:
        number, bits = len(self.values), 1 << len(self.values)
        for parent in parents:
            bits |= self.values[parent].ancestors
        self.values.append(Value(bits, tuple(parents), function, self.stack[-1]))
        self.kept.append(tensor)
        self.ids[id(tensor)] = number
        base = tensor._base
        if base is not None and changes(function) and id(base) in self.ids:
            self.ids[id(base)] = number
        return number

    def found(self) -> list[Addition]:
        """Every addition of two values of which either may be the shortcut of the other."""
        made: list[Addition] = []
        sums: set[int] = set()
        layers: dict[tuple[int, str], set[str]] = {}
        for number, left, right, _ in self.additions:
            for kept in (left, right):
                alike = re.sub(r"\d+", "", self.owners[number])
                layers.setdefault((kept, alike), set()).add(self.owners[number])
        for number, left, right, total in self.additions:
            of = self.values[left].ancestors, self.values[right].ancestors
            for side, kept in enumerate((left, right)):
                other = (right, left)[side]
                identity = bool(of[1 - side] >> kept & 1) and kept != other
                own = bits_of(of[1 - side] & ~of[side])
                if identity:
                    own = [n for n in own if self.values[n].ancestors >> kept & 1]
                elif (
                    of[side] >> other & 1
                    or not of[0] & of[1]
                    or (other in sums and kept not in sums)  # x + f(x) + g(x)
                ):
                    continue
                if any(m in self.values[n].function for n in own for m in MIXES):
                    names = frozenset(self.values[n].module for n in own)
                    owner = self.owners[number]
                    if identity:
                        sums.add(total)
                    last = self.values[other].module
                    made.append(
                        Addition(
                            number,
                            side,
                            identity,
                            frozenset(own),
                            names,
                            owner,
                            last,
                            any(m in self.values[n].function for n in own for m in RESIZES),
                            len(layers[kept, re.sub(r"\d+", "", owner)]) > 1,
                        )
                    )
        return made

    def alone(self, additions: list[Addition]) -> set[str]:
        """Modules all of whose values are for the branches of `additions` alone."""
        totals = {total for number, _, _, total in self.additions}
        own = set[int]().union(*(a.inside for a in additions))
        needed: set[int] = set()
        for n, value in enumerate(self.values):
            if n not in own and n not in totals:
                needed.update(value.parents)
        for n in sorted(own, reverse=True):
            if n in needed:
                needed.update(self.values[n].parents)
        names = {self.values[n].module for n in own - needed}
        return names - {v.module for n, v in enumerate(self.values) if n not in own - needed}


def changes(function: str) -> bool:
    """Whether it works in place, by its name."""
    if function[-2:] == "__":
        return function == "__setitem__" or function[:3] == "__i"
    return function[-1:] == "_"


def bits_of(bits: int) -> list[int]:
    return [n for n, bit in enumerate(reversed(bin(bits)[2:])) if bit == "1"]


def tensors(value: Any, depth: int = 0) -> list[Tensor]:
    """Those in tuples, lists, mappings and objects with attributes."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif not isinstance(value, (tuple, list, set)):
        plain = value is None or isinstance(value, (nn.Module, str, int, float, type))
        held = None if plain or depth > 3 else getattr(value, "__dict__", None)
        value = list(held.values()) if isinstance(held, dict) else []
    return [t for each in value for t in tensors(each, depth + 1)]


@contextmanager
def within(watch: Watch, model: nn.Module) -> Iterator[None]:
    """While entered, `watch` knows in which module of `model` it is."""

    def begin(name: str) -> Callable[..., None]:
        return lambda *_: watch.stack.append(name)

    def end(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        for tensor in tensors(out):
            if id(tensor) not in watch.ids:  # made where functions are not seen
                watch.note(tensor, [watch.value(t) for t in tensors((args, kwargs))], "unknown")
        watch.stack.pop()

    handles = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            handles.append(module.register_forward_pre_hook(begin(name)))
            handles.append(module.register_forward_hook(end, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Claim:
    """What the library says of a block."""

    name: str
    modules: frozenset[str]
    """Of its branches."""
    additions: int
    shortcut: str
    """"identity", "projection" or both."""
    is_whole: bool
    """Whether one gate is for all additions of a module."""


def matched(additions: list[Addition], blocks: list[Claim]) -> list[list[Addition]]:
    """The additions of each block."""
    pairs = []
    for addition in additions:
        for n, block in enumerate(blocks):
            name, modules = block.name, block.modules
            around = {m for m in addition.modules if not m or f"{name}.".startswith(f"{m}.")}
            around -= modules  # a block may be called as the one module of its branch
            own = addition.modules - around
            share = apart = len(own & modules) / max(1, len(own))
            if all(f"{m}.".startswith(f"{name}.") for m in {addition.owner, *own}):
                share = max(share, 0.6)
            if addition.last in modules and addition.identity:  # two streams: of the other's, too
                share = max(share, 0.7)
            if share > 0.5:
                unlike = block.shortcut == "identity" and not addition.identity
                order = unlike, -share, -len(name), not addition.identity, -len(addition.inside)
                pairs.append(((*order, addition.number, n), n, addition, apart > 0.5))
    result: list[list[Addition]] = [[] for _ in blocks]
    taken: set[int] = set()
    pairs = sorted(pairs, key=lambda pair: pair[0])
    for _, n, addition, _ in pairs:
        if len(result[n]) < blocks[n].additions and addition.number not in taken:
            result[n].append(addition)
            taken.add(addition.number)
    sets = Counter(block.modules for block in blocks)
    for _, n, addition, is_apart in pairs:  # more of the same branches: closed with them
        block = blocks[n]
        is_more = addition.identity or (is_apart and block.is_whole)
        owner = f"{addition.owner}." if addition.owner else ""
        is_more &= any(f"{m}.".startswith(owner) for m in block.modules)  # not one beside it
        is_more &= f"{addition.owner}.".startswith(f"{block.name}.")
        if is_more and addition.number not in taken and sets[block.modules] < 2:
            result[n].append(addition)
            taken.add(addition.number)
    for n, block in enumerate(blocks):  # those that share their modules, in turn
        alike = [k for k, other in enumerate(blocks) if other.modules == block.modules]
        if alike[0] == n and len(alike) > 1:
            every = iter(sorted((a for k in alike for a in result[k]), key=lambda a: a.number))
            for k in alike:
                result[k] = list(itertools.islice(every, blocks[k].additions))
    return result


def missed(additions: list[Addition], known: list[list[Addition]]) -> list[Addition]:
    """Identity additions that no block has.

    Not those within the branch of one that a block has, nor a bias that layers share, nor long skip
    connections: around those of several blocks, or where something is made larger again.

    Args:
        known: of each block.
    """
    numbers = {addition.number for block in known for addition in block}

    def is_missed(one: Addition) -> bool:
        touched = [block for block in known if any(k.inside & one.inside for k in block)]
        if one.resizes or one.is_bias or len(touched) > 1:
            return False
        return not touched or any(k.inside < one.inside for k in touched[0])

    return [a for a in additions if a.identity and a.number not in numbers and is_missed(a)]


@contextmanager
def counted(model: nn.Module) -> Iterator[Counter[str]]:
    """How often each module is called."""
    calls: Counter[str] = Counter()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: calls.update([name])

    handles = [
        module.register_forward_pre_hook(note(name))
        for name, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
