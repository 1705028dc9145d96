"""What a method does besides its branch: counts, records, and changes objects of its caller.

It does so under closed gates too, as the original does when its branch is multiplied by 0.
"""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth.surgery.applied import applied_to

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH = 4
X = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))


class Monitor(nn.Module):
    """Returns its input, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x


class Block(nn.Module):
    """`forward` returns `x + g * f(x)`; `seen` and `taps` are objects of the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.monitor = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), Monitor()
        self.register_buffer("passes", torch.zeros(()))

    def branch(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.f(x))
        return self.g(h)


class AppendsToArgument(Block):
    def forward(self, x, taps, seen, g=1.0):
        taps.append(x)
        h = torch.tanh(self.f(x))
        return x + g * h


class AppendsIfAsked(Block):
    def forward(self, x, taps=None, seen=None, g=1.0):
        if taps is not None:
            taps.append(x)
        h = torch.tanh(self.f(x))
        return x + g * h


class CountsInArgument(Block):
    def forward(self, x, taps, seen, g=1.0):
        seen.add_(len(x))
        h = torch.tanh(self.f(x))
        return x + g * h


class CountsInPartOfArgument(Block):
    def forward(self, x, taps, seen, g=1.0):
        count = seen.view(-1)[:1]
        count += 1
        h = torch.tanh(self.f(x))
        return x + g * h


class CountsInBuffer(Block):
    def forward(self, x, taps, seen, g=1.0):
        passes = self.passes
        passes.add_(1)
        h = torch.tanh(self.f(x))
        return x + g * h


class CountsInBufferOfBranch(Block):
    """The branch uses the number, too."""

    def forward(self, x, taps, seen, g=1.0):
        passes = self.passes
        passes += 1
        h = torch.tanh(self.f(x)) * passes.clamp(max=1)
        return x + g * h


class CountsInItsExpression(Block):
    def forward(self, x, taps, seen, g=1.0):
        passes = torch.add(self.passes, 1, out=self.passes)
        h = torch.tanh(self.f(x)) * passes.clamp(max=1)
        return x + g * h


class CountsByFunction(Block):
    def forward(self, x, taps, seen, g=1.0):
        torch.relu_(seen.sub_(1).add_(2))
        passes = self.passes
        nn.init.constant_(passes, 3.0)
        torch._foreach_mul_([passes, seen], 2.0)
        h = torch.tanh(self.f(x))
        return x + g * h


class Monitors(Block):
    """Does not use what the module returns."""

    def forward(self, x, taps, seen, g=1.0):
        seen = self.monitor(x)  # noqa: F841
        h = torch.tanh(self.f(x))
        return x + g * h


class MonitorsForUnused(Block):
    def forward(self, x, taps, seen, g=1.0):
        watched = self.monitor(x)
        doubled = 2 * watched
        h = torch.tanh(self.f(x))
        shape = x.shape, doubled  # noqa: F841
        return x + g * h


class MonitorsInACondition(Block):
    def forward(self, x, taps, seen, g=1.0):
        h = torch.tanh(self.f(x))
        if self.training is not None:
            watched = self.monitor(x)  # noqa: F841
            h = self.g(h)
        return x + g * h


class ReusesTheName(Block):
    def forward(self, x, taps, seen, g=1.0):
        h = self.monitor(x)
        h = torch.tanh(self.f(x))
        return x + g * h


class PopsFromArgument(Block):
    """As the decoder of a U-Net."""

    def forward(self, x, taps, seen, g=1.0):
        taps.append(x)
        taps.append(2 * x)
        skip = taps.pop()
        h = torch.tanh(self.f(x + skip))
        return x + g * h


class FillsAnAttribute(Block):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def forward(self, x, taps, seen, g=1.0):
        kept = self.kept
        kept.append(x)
        taps.extend(kept)
        kept.clear()
        h = torch.tanh(self.f(x))
        return x + g * h


class FillsADictionary(Block):
    def forward(self, x, taps, seen, g=1.0):
        options = {"weight": self.f.weight}
        options.update(bias=self.f.bias)
        bias = options.pop("bias")
        h = torch.tanh(nn.functional.linear(x, bias=bias, **options))
        return x + g * h


EFFECTS = [
    AppendsToArgument, AppendsIfAsked, CountsInArgument, CountsInPartOfArgument, CountsInBuffer,
    CountsInBufferOfBranch, CountsInItsExpression, CountsByFunction, Monitors, MonitorsForUnused,
    MonitorsInACondition, ReusesTheName, PopsFromArgument, FillsAnAttribute, FillsADictionary,
]  # fmt: skip


class AppendsItsBranch(Block):
    def forward(self, x, taps, seen, g=1.0):
        h = torch.tanh(self.f(x))
        taps.append(h)
        return x + g * h


class CountsItsBranch(Block):
    def forward(self, x, taps, seen, g=1.0):
        h = torch.tanh(self.f(x))
        counted = self.count(h)  # noqa: F841
        return x + g * h

    def count(self, h):
        self.passes += 1
        return h


class MonitorsInALoop(Block):
    def forward(self, x, taps, seen, g=1.0):
        h = x
        for part in (self.f, self.g):
            watched = self.monitor(x)  # noqa: F841
            h = torch.tanh(part(h))
        return x + g * h


class AppendsInItsAddition(Block):
    def forward(self, x, taps, seen, g=1.0):
        return x + g * torch.tanh(self.f(taps.append(x) or x))


class SetsAGlobal(Block):
    def forward(self, x, taps, seen, g=1.0):
        global _latest
        _latest = torch.tanh(self.f(x))
        return x + g * _latest


OF_THE_BRANCH = [
    AppendsItsBranch, CountsItsBranch, MonitorsInALoop, AppendsInItsAddition, SetsAGlobal,
]  # fmt: skip


class GathersFeatures(Block):
    """As a dense block: the list is its own, what is in it is not."""

    def forward(self, x, taps, seen, g=1.0):
        features = [x]
        features.append(self.f(torch.stack(features).sum(0)))
        features += [self.g(features[-1])]
        h = torch.tanh(features[-1])
        return x + g * h


class ScalesItsQueries(Block):
    def forward(self, x, taps, seen, g=1.0):
        both = self.f(x)
        q, k = both[:, :2], both[:, 2:]
        q *= 0.5
        k.relu_()
        size = q.shape[-1]  # noqa: F841
        h = torch.cat([q, k], -1)
        return x + g * h


class ChangesWhatAMethodMade(Block):
    def forward(self, x, taps, seen, g=1.0):
        h = self.branch(x)
        torch.neg_(h)
        h += 0.1
        h = nn.functional.relu(h, inplace=True)
        return x + g * h


OF_ITS_OWN = [GathersFeatures, ScalesItsQueries, ChangesWhatAMethodMade]


class Network(nn.Module):
    def __init__(self, kind: type[Block]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(kind() for _ in range(3))

    def forward(self, x, taps, seen, gates=(1.0, 1.0, 1.0)):
        x = self.stem(x)
        for block, gate in zip(self.blocks, gates, strict=True):
            x = block(x, taps, seen, gate)
        return x


def buffers(model):
    return {name: value.item() for name, value in model.named_buffers()}


def require_same_effects(kind, way):
    model = Network(kind)
    original = copy.deepcopy(model)
    handle = sd.apply(model, sd.Uniform(0.5), example=(X, [], torch.zeros(())))
    assert [found.mechanism for found in applied_to(model).found] == [way] * 3
    for pattern in itertools.product((False, True), repeat=3):
        taps, expected_taps = [], []
        seen, expected_seen = torch.zeros(()), torch.zeros(())
        with handle.forced(list(pattern)):
            out = model(X, taps, seen)
        expected = original(X, expected_taps, expected_seen, tuple(map(float, pattern)))
        torch.testing.assert_close(out, expected)
        assert buffers(model) == buffers(original), pattern
        assert seen == expected_seen
        assert len(taps) == len(expected_taps)
        torch.testing.assert_close(taps, expected_taps)
    return model, handle


def require_nothing_called(model, handle):
    called = []
    for block in model.blocks:
        for part in (block.f, block.g):
            part.register_forward_hook(lambda *_: called.append(1))
    with handle.forced([False] * 3):
        model(X, [], torch.zeros(()))
    assert not called


@pytest.mark.parametrize("kind", EFFECTS)
def test_what_others_can_see_is_done_under_a_closed_gate_and_the_branch_is_skipped(kind):
    model, handle = require_same_effects(kind, "slice")
    require_nothing_called(model, handle)


@pytest.mark.parametrize("kind", OF_THE_BRANCH)
def test_a_block_is_deferred_if_others_can_see_what_its_branch_does(kind):
    require_same_effects(kind, "deferred")


@pytest.mark.parametrize("kind", OF_ITS_OWN)
def test_a_block_is_deferred_if_its_branch_changes_what_it_has_computed(kind):
    model, handle = require_same_effects(kind, "deferred")
    require_nothing_called(model, handle)


def test_a_branch_is_skipped_unless_a_condition_under_which_others_see_it_holds():
    class Keeps(Block):
        """As an attention layer with a cache."""

        def forward(self, x, taps, seen, g=1.0):
            h = torch.tanh(self.f(x))
            if taps is not None:
                taps.append(h)
                h = taps[0]
            return x + g * self.g(h)

    model = Network(Keeps)
    original = copy.deepcopy(model)
    handle = sd.apply(model, sd.Uniform(0.5), example=(X, None, None))
    assert {found.mechanism for found in applied_to(model).found} == {"slice"}
    called = []
    model.blocks[1].f.register_forward_hook(lambda *_: called.append(1))
    with handle.forced([True, False, True]):
        for taps, expected_taps, calls in ((None, None, 0), ([], [], 1)):
            found, expected = model(X, taps, None), original(X, expected_taps, None, (1, 0, 1))
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(taps, expected_taps)
            assert len(called) == calls


def test_a_change_of_what_the_shortcut_shares_is_made_under_a_closed_gate():
    class Shares(Block):
        def forward(self, x, taps, seen, g=1.0):
            x = x * 1.0
            same = x
            same.relu_()
            h = torch.tanh(self.f(same))
            return x + g * h

    model, handle = require_same_effects(Shares, "slice")
    require_nothing_called(model, handle)
