"""Further results of a branch beside its sum: computed under a closed gate where they are used."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stochastic_depth as sd
from stochastic_depth.surgery.applied import applied_to

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH = 4


def inputs(length):
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(length))


class Block(nn.Module):
    """The branch has a second result, `w`; sequences of more than 4 elements need it."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.steps, self.logged = nn.Linear(WIDTH, 2 * WIDTH), 0, []


class HandsOut(Block):
    def forward(self, x, g=1.0):
        w, h = torch.tanh(self.f(x)).chunk(2, -1)
        return x + g * h, w


class HandsOutIfAsked(Block):
    """As DeBERTa."""

    def forward(self, x, g=1.0, asked=True):
        w, h = torch.tanh(self.f(x)).chunk(2, -1)
        y = x + g * h
        if asked:
            return y, w
        else:  # noqa: RET505
            return y, None


class HandsOutWhatItUses(Block):
    """As an attention layer that adds its shortcut itself."""

    def forward(self, x, g=1.0):
        w, h = self.f(x).chunk(2, -1)
        w = torch.tanh(w)
        h = w * h
        y = x + g * torch.tanh(h)
        return y, w


class Adds(nn.Module):
    def forward(self, h, x, g):
        return x + g * torch.tanh(h)


class HandsOutFromTheCaller(Block):
    """As BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.add = Adds()

    def forward(self, x, g=1.0):
        h, w = self.f(x).chunk(2, -1)
        y = self.add(h, x, g)
        return y, w


class HandsOutInParts(Block):
    def forward(self, x, g=1.0):
        w, h = torch.tanh(self.f(x)).chunk(2, -1)
        y = x + g * h
        outputs = (y,)
        if self.training is not None:
            outputs = outputs + (w,)  # noqa: RUF005
        return outputs


class HandsOutIfComputed(Block):
    def forward(self, x, g=1.0):
        w, h = torch.tanh(self.f(x)).chunk(2, -1)
        y = x + g * h
        outputs = [y]
        if w is not None:
            outputs += [{"weights": w}]
        return outputs if w is not None else [y, None]


class HandsOutOrReturns(Block):
    def forward(self, x, g=1.0):
        w, h = torch.tanh(self.f(x)).chunk(2, -1)
        y = x + g * h
        if w is None:
            return y, None
        return y, w


class ComputesIfMissing(Block):
    """As T5: who gets None computes it again."""

    def forward(self, x, g=1.0):
        w, h = torch.tanh(self.f(x)).chunk(2, -1)
        y = x + g * h
        if w is None:
            w = torch.zeros_like(y)
        return y, w


class HandsOutBoth(Block):
    """The statement that is for the branch is not for its second result."""

    def forward(self, x, g=1.0):
        both = self.f(x)
        w = both[..., :WIDTH]
        return x + g * torch.tanh(both[..., WIDTH:]), w


DEFERRED = [
    HandsOutInParts, HandsOutIfComputed, HandsOutOrReturns, ComputesIfMissing, HandsOutBoth,
]  # fmt: skip


class Logs(Block):
    def forward(self, x, g=1.0):
        self.steps += 1
        w, h = torch.tanh(self.f(x)).chunk(2, -1)
        y = x + g * h
        if x.size(1) > 4:
            self.logged = [w.detach().abs().mean().item()]
        return y


class LogsBefore(Block):
    def forward(self, x, g=1.0):
        w, h = torch.tanh(self.f(x)).chunk(2, -1)
        if x.size(1) > 4:
            self.logged = [w.detach().abs().mean().item()]
        return x + g * h


class AddsBias(Block):
    def forward(self, x, g=1.0):
        w, h = torch.tanh(self.f(x)).chunk(2, -1)
        y = x + g * h
        if y.size(1) > 4:
            y = F.layer_norm(y, (WIDTH,)) if w is None else F.layer_norm(y, (WIDTH,)) + w
        return y


class Masks(Block):
    def forward(self, x, g=1.0):
        w, h = torch.tanh(self.f(x)).chunk(2, -1)
        y = x + g * h
        if y.size(1) > 4:
            mask = (w @ w.transpose(1, 2)) if w is not None else None
            y = F.scaled_dot_product_attention(y, y, y, attn_mask=mask)
        return y


class PassesOn(Block):
    """To a function that accepts None."""

    def forward(self, x, g=1.0):
        w, h = torch.tanh(self.f(x)).chunk(2, -1)
        y = x + g * h
        if y.size(1) > 4:
            y = F.linear(y, self.f.weight[:WIDTH], w[0, 0])
            extra = (y, w)
            y = F.layer_norm(y, (WIDTH,), bias=extra[1][0, 0])
        return y


class Decides(Block):
    """Returns before a part of its work if the result is missing."""

    def forward(self, x, g=1.0):
        w, h = torch.tanh(self.f(x)).chunk(2, -1)
        y = x + g * h
        if w is None:
            return y
        if y.size(1) > 4:
            y = y * 2
        return y


class DecidesInArm(Block):
    def forward(self, x, g=1.0):
        w, h = torch.tanh(self.f(x)).chunk(2, -1)
        y = x + g * h
        factor = 1.0
        if y.size(1) > 4 and w is not None:
            factor = 2.0
        return y * factor


class SometimesNone(Block):
    """None on the example."""

    def forward(self, x, g=1.0):
        h = torch.tanh(self.f(x))
        w = None
        if h.size(1) > 4:
            w, h = h[..., :WIDTH], 2 * h
        y = x + g * h[..., WIDTH:]
        return y if w is None else y + w


class HandsOutItsArgument(Block):
    """Which the branch uses, too."""

    def forward(self, x, g=1.0):
        y, x = self.add_to(x, g, x * 2)
        return y if x.size(1) <= 4 else y + x

    def add_to(self, x, g, w):
        h = torch.tanh(self.f(w))[..., :WIDTH]
        y = x + g * h
        return y, w


class ReturnsInstead(Block):
    def forward(self, x, g=1.0):
        h, w = torch.tanh(self.f(x)).chunk(2, -1)
        y = x + g * h
        if x.size(1) > 4:
            return w
        return y, w


class SetsInItsExpression(Block):
    def forward(self, x, g=1.0):
        h = x
        y = x + g * (h := torch.tanh(self.f(x))[..., :WIDTH])
        return y + h if x.size(1) > 4 else y


class UsesInAFunction(Block):
    def forward(self, x, g=1.0):
        h = x
        late = lambda: h  # noqa: E731
        h = torch.tanh(self.f(x))[..., :WIDTH]
        y = x + g * h
        return y + late() if x.size(1) > 4 else y


class UsesInALoop(Block):
    """Under a condition that the loop changes."""

    def forward(self, x, g=1.0):
        h, late = x, False
        h = torch.tanh(self.f(h))[..., :WIDTH]
        y = x + g * h
        for _ in range(2):
            y = y + (h if late else 0)
            late = x.size(1) > 4
        return y


class UsesIfChanged(Block):
    """Under a condition that is set after the addition."""

    def forward(self, x, g=1.0):
        h, late = x, self.steps > 0
        h = torch.tanh(self.f(h))[..., :WIDTH]
        y = x + g * h
        late = x.size(1) > 4
        return y + h if late else y


USED = [
    Logs, LogsBefore, AddsBias, Masks, PassesOn, Decides, DecidesInArm, SometimesNone,
    ReturnsInstead, SetsInItsExpression, UsesInAFunction, UsesInALoop, UsesIfChanged,
]  # fmt: skip


class Independent(Block):
    """Its second result needs nothing of the branch, and has a statement for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, g=1.0):
        w = self.p(x)
        h = torch.tanh(self.f(x))[..., :WIDTH]
        y = x + g * h
        if y.size(1) > 4:
            y = y + w
        return y


class Network(nn.Module):
    """Ignores the second results."""

    def __init__(self, kind: type[Block]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(kind() for _ in range(3))

    def forward(self, x, gates=(1.0, 1.0, 1.0)):
        for block, gate in zip(self.blocks, gates, strict=True):
            out = block(x, gate)
            x = out if isinstance(out, torch.Tensor) else out[0]
        return x


def require_exact(kind, way):
    model = Network(kind)
    original = copy.deepcopy(model)
    handle = sd.apply(model, sd.Uniform(0.5), example=inputs(4))
    assert [found.mechanism for found in applied_to(model).found] == [way] * 3
    for length, pattern in itertools.product((4, 7), itertools.product((False, True), repeat=3)):
        with handle.forced(list(pattern)):
            out = model(inputs(length))
        expected = original(inputs(length), tuple(map(float, pattern)))
        torch.testing.assert_close(out, expected)
        for block, plain in zip(model.blocks, original.blocks, strict=True):
            assert block.logged == pytest.approx(plain.logged)
    return model, handle


@pytest.mark.parametrize(
    "kind", [HandsOut, HandsOutIfAsked, HandsOutWhatItUses, HandsOutFromTheCaller]
)
def test_a_side_output_that_is_only_returned_is_none_while_its_block_is_closed(kind):
    model, handle = require_exact(kind, "call" if kind is HandsOutFromTheCaller else "slice")
    called = []
    for block in model.blocks:
        block.f.register_forward_hook(lambda *_: called.append(1))
    with handle.forced([False] * 3):
        model(inputs(4))
        _, side = model.blocks[0](inputs(4))
    assert not called
    assert side is None


@pytest.mark.parametrize("kind", DEFERRED)
def test_a_side_output_that_nothing_uses_is_not_computed_while_its_block_is_closed(kind):
    model, handle = require_exact(kind, "deferred")
    called = []
    for block in model.blocks:
        block.f.register_forward_hook(lambda *_: called.append(1))
    with handle.forced([False] * 3):
        model(inputs(4))
    assert not called


def test_an_argument_that_is_handed_out_is_passed():
    require_exact(HandsOutItsArgument, "call")


@pytest.mark.parametrize("kind", USED)
def test_a_side_output_that_is_used_on_other_inputs_than_the_example_is_computed(kind):
    require_exact(kind, "deferred")


def test_a_side_output_that_needs_nothing_of_the_branch_is_always_computed():
    model, handle = require_exact(Independent, "slice")
    called = []
    for block in model.blocks:
        block.f.register_forward_hook(lambda *_: called.append(1))
    with handle.forced([False] * 3):
        model(inputs(7))
    assert not called
