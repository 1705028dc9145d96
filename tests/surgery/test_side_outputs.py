"""Further results of a branch beside its sum: None under a closed gate, if that changes nothing."""

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


HANDED_OUT = [HandsOut, HandsOutInParts, HandsOutIfComputed, HandsOutOrReturns, ComputesIfMissing]


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


USED = [
    Logs, LogsBefore, AddsBias, Masks, PassesOn, Decides, DecidesInArm, SometimesNone,
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


@pytest.mark.parametrize("kind", HANDED_OUT)
def test_a_side_output_that_is_only_handed_out_is_none_while_its_block_is_closed(kind):
    model, handle = require_exact(kind, "slice")
    called = []
    for block in model.blocks:
        block.f.register_forward_hook(lambda *_: called.append(1))
    with handle.forced([False] * 3):
        model(inputs(4))
        _, side = model.blocks[0](inputs(4))
    assert not called
    if kind is ComputesIfMissing:
        assert not side.any()
    else:
        assert side is None or side == {"weights": None}


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
