"""Residual blocks that know nothing of this library, in every form an addition comes in."""

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stochastic_depth as sd

WIDTH = 6


class Base(nn.Module):
    """A block: `norm`, `one`, `two` and their composition `f`."""

    def __init__(self, flag: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.act = nn.ReLU(inplace=True)
        self.project = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.5))
        self.flag = flag

    def f(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(self.norm(x))))


class Left(Base):
    def forward(self, x):
        return x + self.f(x)


class Right(Base):
    def forward(self, x):
        return self.f(x) + x


class InPlace(Base):
    def forward(self, x):
        identity = x
        out = self.one(x)
        out = torch.tanh(out)
        out = self.two(out)
        out += identity
        return self.act(out)


class ShortcutInPlace(Base):
    def forward(self, x):
        x = x * 1.0
        x += self.two(torch.tanh(self.one(x * 2)))
        return x


class Projection(Base):
    def forward(self, x):
        shortcut = x
        x = self.one(x)
        x = self.two(torch.tanh(x))
        if self.flag is not None:
            shortcut = self.project(shortcut)
        return F.relu(shortcut + x, inplace=True)


class TorchAdd(Base):
    def forward(self, x):
        return torch.add(x, self.f(x))


class MethodAdd(Base):
    def forward(self, x):
        return self.f(x).add(x)


class Scaled(Base):
    def forward(self, x):
        return x + self.gamma * self.f(x)


class Conditional(Base):
    def forward(self, x):
        y = self.one(x)
        y = self.two(y)
        if self.flag:
            y += x
        return y


class EarlyReturn(Base):
    def forward(self, x):
        if self.flag:
            return x + self.f(x)
        return self.f(x)


class OtherSelf(Base):
    def forward(this, x):  # noqa: N805
        return x + this.f(x)


class WithSuper(Left):
    def forward(self, x, scale=1.0, *, shift=0.0):
        return super().forward(x) * scale + shift


class Helper(Base):
    def forward(self, x):
        return self.inner(x)

    def inner(self, x):
        y = self.f(x)
        return y + x


class Annotated(Base):
    def forward(self, x: "Tensor") -> "Tensor":
        y: Tensor = self.f(x)
        z, _unused = y * 2, 0
        return x + z


class PreActivation(Base):
    def forward(self, x):
        pre = self.norm(x)
        shortcut = x
        if self.flag == "project":
            shortcut = self.project(pre)
        return self.two(torch.tanh(self.one(pre))) + shortcut


class ScalesInPlace(Base):
    def forward(self, x):
        out = self.f(x)
        if self.gamma is not None:
            out.mul_(self.gamma)
        return out * 0.5 + x


class GathersParts(Base):
    """As Res2Net: the sums over the parts are no residual additions, the last one is."""

    def forward(self, x):
        parts = self.one(self.norm(x)).chunk(3, dim=-1)
        out = [parts[0]]
        for part in parts[1:]:
            mixed = self.two.weight[:2, :2] @ out[-1][..., None]
            out.append(torch.tanh(mixed[..., 0]) + part)
        return self.two(torch.cat(out, -1)) + x


class Comprehends(Base):
    def forward(self, x):
        i = 1.0
        parts = [self.f(x) * i for i in (0.25, 0.75)]
        y = parts[0] + parts[1]
        return x * i + y


class ChangesItsMind(Base):
    def forward(self, x):
        y = self.f(x)
        self.flag = True
        if self.flag:
            y = x + y
        return y


def logged(function):
    @functools.wraps(function)
    def wrapper(self, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        return function(self, *args, **kwargs)

    return wrapper


class Decorated(Base):
    @logged
    def forward(self, x):
        return x + self.f(x)


class WrapsItsChildren(Base):
    """As the layers of transformers, whose parent wraps `forward` for activation checkpointing."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.forward = logged(cls.forward)


class Wrapped(WrapsItsChildren):
    def forward(self, x):
        residual = x
        x = self.f(x)
        return residual + x


def joined(x, y):
    return x + y


class InFunction(Base):
    """The addition is in no method, so the block is skipped as a whole."""

    def forward(self, x):
        return joined(x, self.f(x))


NoSource: type = type(
    "NoSource",
    (Base,),
    {"forward": eval(compile("lambda self, x: x + self.f(x)", "<none>", "eval"))},
)
"""The interpreter knows where the addition is, but there is nothing to read."""


class Add(nn.Module):
    def forward(self, h, x):
        h = torch.tanh(h)
        return h + x


class Weighted(nn.Module):
    def forward(self, h):
        return h * 2, None


class InChild(Base):
    """As BERT: the branch begins in the parent and ends in a child, and there is a side output."""

    def __init__(self) -> None:
        super().__init__()
        self.weighted, self.output = Weighted(), Add()

    def forward(self, x):
        y = self.f(x)
        y, weights = self.weighted(y)
        out = self.output(y, x)
        return out if weights is None else (out, weights)


class Between(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.output = Add()

    def forward(self, x, *, h):
        h = h * 0.5
        return self.output(h, x=x)


class InGrandchild(Base):
    def __init__(self) -> None:
        super().__init__()
        self.between = Between()

    def forward(self, x):
        return self.between(x, h=self.f(x))


class InMethod(Base):
    """The branch begins in the method that calls the one that adds."""

    def forward(self, x):
        return self.joined(self.f(x), x)

    def joined(self, h, x):
        if self.flag:
            h = h + x
        return h


class SideOutput(Base):
    def forward(self, x):
        y = self.f(x)
        self.seen = y.sum() * 0
        return x + y + self.seen


class SaysHow(Base):
    """Its sum is taken apart again, which only a registered forward method can skip."""

    def forward(self, x):
        y = self.f(x)
        out = torch.stack([x + y, y])
        return out[0]


@sd.register_unit(SaysHow)
def skip_or_sum(block, gate, x):
    return x + gate.scale(block.f(gate.select(x))) if gate.open else x


ONE_ADDITION = [
    Left, Right, InPlace, ShortcutInPlace, Projection, TorchAdd, MethodAdd, Scaled, Conditional,
    EarlyReturn, OtherSelf, WithSuper, Helper, Annotated, PreActivation, Decorated, Wrapped,
    Comprehends, ScalesInPlace, GathersParts, ChangesItsMind, InFunction, NoSource, InChild,
    InGrandchild, InMethod, SaysHow,
]  # fmt: skip


def closed(block: nn.Module, x: Tensor) -> Tensor:
    """What a closed block must do, written by hand."""
    if isinstance(block, InPlace):
        return F.relu(x)
    if isinstance(block, Projection):
        return F.relu(block.project(x))
    return x


def network(kind: type[nn.Module], blocks: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, WIDTH), *(kind() for _ in range(blocks))).double()


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def require_surviving_network(
    original: nn.Sequential, model: nn.Sequential, handle: sd.Handle
) -> None:
    """Under all gates: output and gradients of the open blocks, and no call of a closed branch.

    Args:
        original: a network of `network`.
        model: an equal one that has stochastic depth.
    """
    stem, *blocks = original
    for pattern in itertools.product((False, True), repeat=len(blocks)):
        with handle.forced(pattern):
            out = model.forward(X)
            watched, called = _calls(model)
        assert torch.equal(watched, out)
        assert called == {number for number, is_open in enumerate(pattern) if is_open}
        expected = stem(X)
        for block, is_open in zip(blocks, pattern, strict=True):
            expected = block(expected) if is_open else closed(block, expected)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        for one, result in ((model, out), (original, expected)):
            one.zero_grad()
            result.square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), original.parameters(), strict=True):
            if q.grad is None:
                assert p.grad is None, (name, pattern)
            else:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


def _calls(model: nn.Sequential) -> tuple[Tensor, set[int]]:
    """The output of a pass, and the blocks of whose branches any part was called in it."""
    called: set[int] = set()
    hooks = [
        part.register_forward_hook(lambda *_, number=number: called.add(number))
        for number, block in enumerate(list(model)[1:])
        for part in (block.norm, block.one, block.two)
    ]
    out = model.forward(X)
    for hook in hooks:
        hook.remove()
    return out, called
