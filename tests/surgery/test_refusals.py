"""Every refusal: what it says to do is done, and then the model applies and is verified."""

import ast
import re
import types

import pytest
import torch
from torch import nn

import stochastic_depth as sd

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 8


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + torch.relu(self.linear(x))


class Shows(Plain):
    """Most of its branch is an output too."""

    def forward(self, x):
        h = torch.relu(self.linear(x))
        return x + h, h


class Routes(nn.Module):
    """Gathers its branch in a tensor, in place; the router's logits are an output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x):
        h = self.norm(x)
        logits = self.router(h)
        first = logits.argmax(-1)
        out = torch.zeros_like(h)
        for n, expert in enumerate(self.experts):
            rows = (first == n).nonzero()[:, 0]
            out.index_add_(0, rows, expert(h[rows]))
        return x + out, logits


class Lambda(Plain):
    """Its forward method is the instance's."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = types.MethodType(lambda self, x: x + self.linear(x), self)


class TossesACoin(Plain):
    """Drops itself, under no name that anybody knows."""

    def forward(self, x):
        if self.training and torch.rand(()) < 0.5:
            return x
        return super().forward(x)


class Fuses(Plain):
    """In training it adds in a way that is no addition."""

    def forward(self, x):
        if self.training:
            return x - -self.linear(x)
        return x + self.linear(x)


class Leaves(Plain):
    """Leaves a loss on itself, which is not there before the first pass."""

    def forward(self, x):
        h = self.inner(x)
        self.loss = h.square().mean()
        return x + h

    def inner(self, x):
        return self.linear(x)


class LeavesInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = Keeps()

    def forward(self, x):
        return x + self.branch(x)


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        h = self.linear(x)
        self.loss = h.square().mean()
        return h


class Model(nn.Module):
    """Two blocks of a kind between plain ones; the kind's side outputs are outputs."""

    def __init__(self, kind, others: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        plain = [Plain, Plain] if others else []
        self.blocks = nn.ModuleList(make() for make in [*plain, kind, kind])

    def forward(self, x):
        seen = []
        for block in self.blocks:
            out = block(x)
            x, *side = out if isinstance(out, tuple) else (out,)
            seen += side
        return x, seen


class Around(nn.Module):
    """The model itself is a block that cannot be cut: its branch is an output too."""

    def __init__(self, kind) -> None:
        super().__init__()
        self.inside, self.last = Model(kind), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = self.inside(x)[0]
        h = self.last(x)
        return x + h, h


class TimeFirst(nn.Module):
    """[time, samples, channels]."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Steps() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.linear(x).cumsum(0)


KINDS = {
    Shows: "needed for more than what is added",
    Routes: "put into another tensor in place",
    Lambda: "set on the instance",
    TossesACoin: "the model leaves it out by itself",
    Fuses: "in training mode",
    LeavesInside: "leaves 'loss' on",
}


def followed(message: str) -> dict:
    """The options that an error advises."""
    options = {}
    for name in ("exclude", "include"):
        advised = re.search(rf"\b{name}=(\[.*?\])", message)
        if advised:
            options[name] = ast.literal_eval(advised[1])
    if 'gate="batch"' in message:
        options["gate"] = "batch"
    return options


def applies(make, x, message, **options):
    options |= followed(message)
    model = make()
    handle = sd.apply(model, sd.Uniform(0.5), example=x, **options)
    sd.verify(model, x, repeats=1)
    return [block.name for block in handle.blocks]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_advice_of_a_refused_block_makes_the_model_apply(kind):
    x = torch.randn(3, WIDTH)
    with pytest.raises(sd.UnsupportedBlockError, match=KINDS[kind]) as refused:
        sd.apply(Model(kind), sd.Uniform(0.5), example=x)
    assert "exclude=['']" not in str(refused.value)
    assert applies(lambda: Model(kind), x, str(refused.value)) == ["blocks.0", "blocks.1"]


def test_where_nothing_can_be_skipped_nothing_is_to_be_left_out():
    with pytest.raises(sd.UnsupportedBlockError, match="no other block of the model") as refused:
        sd.apply(Model(Shows, others=False), example=torch.randn(3, WIDTH))
    assert not followed(str(refused.value))


def test_the_blocks_inside_of_a_model_that_is_none_are_still_skipped():
    x = torch.randn(3, WIDTH)
    with pytest.raises(sd.UnsupportedBlockError) as refused:
        sd.apply(Around(Plain), example=x)
    names = applies(lambda: Around(Plain), x, str(refused.value))
    assert names == [f"inside.blocks.{n}" for n in range(4)]


@pytest.mark.parametrize("gate", ["sample", "subset"])
def test_samples_that_are_not_first_need_one_coin_for_all(gate):
    x = torch.randn(4, 3, WIDTH)
    with pytest.raises(sd.ApplyError, match="is not the batch") as refused:
        sd.apply(TimeFirst(), example=x, gate=gate)
    assert len(applies(TimeFirst, x, str(refused.value), gate=gate)) == 2
