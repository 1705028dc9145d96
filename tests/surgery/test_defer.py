"""Blocks that are deferred: every form that can be rewritten, and those that cannot."""

import copy
import functools
import importlib
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd
from stochastic_depth.surgery.applied import applied_to
from stochastic_depth.surgery.find.find_blocks import find_blocks
from support.blocks import ONE_ADDITION, WIDTH, SaysHow, X, network, require_surviving_network

pytestmark = pytest.mark.usefixtures("one_thread")

FORMS = [kind for kind in ONE_ADDITION if kind is not SaysHow]


@pytest.fixture
def all_deferred(monkeypatch):
    """Whatever could be rewritten is deferred all the same."""
    module = importlib.import_module("stochastic_depth.surgery.apply")
    monkeypatch.setattr(module, "find_blocks", _never_rewriting)


def note(called, number, *_):
    called.append(number)


class All:
    def __contains__(self, name: object) -> bool:
        return True


def _never_rewriting(*args, defer, **kwargs):
    return find_blocks(*args, **kwargs, defer=All())


@pytest.mark.usefixtures("all_deferred")
@pytest.mark.parametrize("kind", FORMS)
def test_every_pattern_of_gates_gives_outputs_and_gradients_of_the_surviving_network(kind):
    original, model = network(kind), network(kind)
    handle = sd.apply(model, sd.LinearDecay(0.5), example=X)
    assert [block.mechanism for block in applied_to(model).found] == ["deferred"] * 3
    require_surviving_network(original, model, handle)


class Apart(nn.Module):
    """The parts of a branch are in lists of their own, as in networks on graphs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))

    def forward(self, x):
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = x + torch.relu(norm(linear(x)))
        return x


def test_branches_whose_parts_are_in_several_lists_are_blocks():
    x = torch.randn(2, WIDTH)
    original, model = Apart(), Apart()
    handle = sd.apply(model, example=x)
    assert len(handle.blocks) == 3
    called = []
    model.linears[1].register_forward_hook(functools.partial(note, called, 1))
    model.norms[1].register_forward_hook(functools.partial(note, called, 1))
    with handle.forced([True, False, True]):
        out = model(x)
    h = x + torch.relu(original.norms[0](original.linears[0](x)))
    torch.testing.assert_close(out, h + torch.relu(original.norms[2](original.linears[2](h))))
    assert not called


class Projecting(nn.Module):
    """Adds something itself: a projection, as layers for graphs do."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.skip = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.up(torch.relu(self.down(x))) + self.skip(x)


def test_the_addition_of_a_trunk_covers_those_inside_of_its_layers():
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(Projecting() for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = x + torch.tanh(layer(x))
            return x

    x = torch.randn(2, WIDTH)
    original, model = Around(), Around()
    handle = sd.apply(model, example=x)
    assert [block.name for block in handle.blocks] == ["layers.0", "layers.1", "layers.2"]
    called = []
    for part in model.layers[1].modules():
        part.register_forward_hook(functools.partial(note, called, 1))
    with handle.forced([True, False, True]):
        out = model(x)
    h = x + torch.tanh(original.layers[0](x))
    torch.testing.assert_close(out, h + torch.tanh(original.layers[2](h)))
    assert not called


class AsksForDevice(Apart):
    def forward(self, x):
        for linear, norm in zip(self.linears, self.norms, strict=True):
            h = norm(linear(x))
            x = x + (torch.relu(h) if not h.is_cuda else h.relu())
        return x


def test_flops_are_counted_of_a_branch_that_is_asked_for_its_device():
    model, x = AsksForDevice(), torch.randn(2, WIDTH)
    sd.apply(model, example=x)
    costs = sd.summary(model, x)
    assert [block.forward for block in costs.blocks] == [2 * 2 * WIDTH * WIDTH] * 3


class Streams(nn.Module):
    """Two streams that feed each other; the last block's second one is never read."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(2 * WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, 2 * WIDTH)
            self.drop_path = nn.Identity()

        def forward(self, x, y):
            parts = self.drop_path(self.one(torch.cat([x, y], dim=-1)).tanh())
            x = x + parts[:, :WIDTH]
            y = y + parts[:, WIDTH:]
            parts = self.drop_path(self.two(torch.cat([x, y], dim=-1)).tanh())
            return x + parts[:, :WIDTH], y + parts[:, WIDTH:]

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, x):
        y = x.flip(-1)
        for block in self.blocks:
            x, y = block(x, y)
        return x


def test_streams_that_feed_each_other_are_closed_together() -> None:
    torch.manual_seed(0)
    model, given = Streams().double(), torch.randn(5, WIDTH).double()
    original = copy.deepcopy(model)
    handle = sd.apply(model, sd.LinearDecay(0.5), example=given)
    assert [block.name for block in applied_to(model).found] == ["blocks.0", "blocks.1", "blocks.2"]
    for pattern in itertools.product((False, True), repeat=3):
        with handle.forced(pattern):
            out = model(given)
        x, y = given, given.flip(-1)
        for block, is_open in zip(original.blocks, pattern, strict=True):
            x, y = block(x, y) if is_open else (x, y)
        torch.testing.assert_close(out, x, rtol=1e-12, atol=1e-12)


class Pairs(nn.Module):
    """Two branches a layer, added by the trunk."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(4, WIDTH)
        self.layers = nn.ModuleList(nn.ModuleList([branch(), branch()]) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        for first, second in self.layers:
            x = first(x) + x
            x = second(x) + x
        return x


def branch() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh())


def test_additions_in_a_loop_of_the_trunk_are_blocks_of_its_layers() -> None:
    model = Pairs().double()
    handle = sd.apply(model, sd.Uniform(0.5), example=X)
    assert [block.name for block in handle.blocks] == ["layers.0", "layers.1", "layers.2"]
    for pattern in itertools.product((False, True), repeat=3):
        with handle.forced(pattern):
            out = model.forward(X)
        expected = model.stem(X)
        for is_open, (first, second) in zip(pattern, model.layers, strict=True):
            for part in (first, second) if is_open else ():
                expected = part(expected) + expected
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    model.eval()
    expected = model.stem(X)
    for first, second in model.layers:
        expected = expected + 0.5 * first(expected)
        expected = expected + 0.5 * second(expected)
    torch.testing.assert_close(model(X), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", ["sample", "subset"])
@pytest.mark.parametrize("scale", ["inference", "training"])
def test_gates_for_single_samples_weigh_each_sample(gate, scale) -> None:
    model, plain = Pairs().double(), Pairs().double()
    handle = sd.apply(model, sd.Uniform(0.5), example=X, gate=gate, scale=scale)
    model.train()
    for _ in range(4):
        out, expected = model(X), plain.stem(X)
        for coins, pair in zip(handle.gates.double(), plain.layers, strict=True):
            for part in pair:
                weight = coins[:, None] / (0.5 if scale == "training" else 1)
                expected = expected + weight * part(expected)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


class Meeting(nn.Module):
    """Lets two threads begin, and each of three layers run, at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3)).double()
        self.last = nn.Dropout(0.0)
        self.two: threading.Barrier | None = None

    def forward(self, x: torch.Tensor, late: bool = False) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            if self.two is not None and (number or not late):
                self.two.wait(timeout=60)
            x = x + self.last(torch.tanh(layer(x)))
        if self.two is not None and late:
            self.two.wait(timeout=60)
        return x


def test_threads_that_evaluate_at_once_do_not_disturb_each_other() -> None:
    torch.manual_seed(0)
    model, x = Meeting(), torch.randn(2, 4, WIDTH, dtype=torch.float64)
    handle = sd.apply(model, sd.Uniform(0.5), example=x[0])
    assert {found.mechanism for found in applied_to(model).found} == {"deferred"}
    expected = x
    for layer in model.layers:
        expected = expected + 0.5 * torch.tanh(layer(expected))
    model.eval()
    model.two = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:  # the second is one layer behind, and ends later
        outputs = list(pool.map(model, x, [False, True]))
    model.two = None
    for output, right in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, right)
    with handle.subnetwork([False] * 3):
        assert torch.equal(model(x[0]), x[0])


class Checkpointed(Pairs):
    def forward(self, x):
        x = self.stem(x)
        for first, second in self.layers:
            x = checkpoint(first, x, use_reentrant=False) + x
            x = checkpoint(lambda y, part=second: part(y) + y, x, use_reentrant=False)
        return x


def test_activation_checkpointing_changes_no_gradient() -> None:
    plain, model = Pairs().double(), Checkpointed().double()
    for m in (plain, model):
        sd.apply(m, sd.Uniform(0.5), example=X)
    for _ in range(6):
        for m in (plain, model):
            m.zero_grad()
            m(X).square().sum().backward()
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


class Router(nn.Module):
    """An expert is chosen, and what chooses is needed for a loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.route, self.more = nn.Linear(4, 2), nn.Linear(4, 4)
        self.expert = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh())

    def forward(self, x):
        logits = self.route(x)
        y = self.expert(x) * logits.softmax(-1)[:, :1]
        if y.shape != x.shape or len((y, x)) != 2:
            raise ValueError
        return sum([x, self.more(y)]), logits.logsumexp(-1).mean()


def test_what_is_needed_elsewhere_runs_and_the_rest_does_not() -> None:
    model = Router().double()
    handle = sd.apply(model, sd.Uniform(0.5), example=X)
    called = []
    for name, module in model.named_children():
        module.register_forward_hook(functools.partial(note, called, name))
    with handle.forced([False]):
        out, loss = model.forward(X)
    assert called == ["route"]
    assert torch.equal(out, X)
    torch.testing.assert_close(loss, model.route(X).logsumexp(-1).mean())


def test_a_placeholder_is_computed_for_whoever_asks_and_only_then() -> None:
    ran = []

    class Peeks(nn.Module):
        peek = False

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.one(x)
            assert y.shape == (len(x), 4)
            assert y.dtype == x.dtype
            assert y.device == x.device
            if self.peek:
                ran.append(y.sum().item())
            y = self.two(y.relu()).view(-1, 2, 2).flatten(1)
            return x + y

    model = Peeks().double()
    handle = sd.apply(model, example=X)
    called = []
    for name, module in model.named_children():
        module.register_forward_hook(functools.partial(note, called, name))
    with handle.forced([False]):
        assert torch.equal(model.forward(X), X)
        assert called == []
        model.peek = True
        assert torch.equal(model.forward(X), X)
    assert called == ["one"]
    assert ran == [pytest.approx(model.one(X).sum().item())]


class Iterates(nn.Module):
    """As many functions in a branch as the input is long."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            h = layer(x)
            for _ in range(x.shape[1]):
                h = torch.tanh(h)
            self.kept = h
            batch, time, width = h.shape
            x = h.reshape(batch, time, width) + x
        return x


def test_a_branch_may_be_a_chain_of_any_length() -> None:
    model = Iterates()
    handle = sd.apply(model, example=torch.randn(2, 6, 4))
    x = torch.randn(2, 2000, 4, requires_grad=True)
    with handle.forced([False, False]):
        out = model.train()(x)
        kept = model.kept
        assert kept.requires_grad
    assert torch.equal(out, x)
    assert kept.isfinite().all()


def test_whether_a_closed_branch_has_gradients_is_asked_once_for_each_call() -> None:
    class Squares(Iterates):
        def forward(self, x):
            for layer in self.layers:
                y = layer(x)
                for _ in range(60):
                    y = y * y
                x = x + (y if y.requires_grad else 2 * y)
            return x

    model = Squares().requires_grad_(False)
    handle = sd.apply(model, example=X[:, :4].float())
    with handle.forced([False, False]):
        x = torch.randn(3, 4)
        assert torch.equal(model.train()(x), x)


def test_a_plan_says_what_apply_does() -> None:
    plan = sd.plan(Pairs().double(), X)
    assert plan.complete
    assert [block.mechanism for block in plan.blocks] == ["deferred"] * 3


class SharesFeedForward(nn.Module):
    """A layer that loops over a linear layer of its own and a feed-forward layer of others, too."""

    def __init__(self, feed_forward: nn.Module) -> None:
        super().__init__()
        self.own, self.feed_forward = nn.Linear(4, 4), feed_forward

    def parts(self):
        return self.own, self.feed_forward

    def forward(self, x, gates=None):
        for number, part in enumerate(self.parts()):
            if gates is None or gates[number]:
                x = x + torch.tanh(part(x))
        return x


class NeighboursShare(nn.Module):
    """Two neighbouring layers share a feed-forward layer; a siamese network calls both twice."""

    def __init__(self, siamese: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.siamese = siamese
        self.shared = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.layers = nn.ModuleList(SharesFeedForward(self.shared[n // 2]) for n in range(4))

    def forward(self, x, gates=None):
        def half(x):
            for number, layer in enumerate(self.layers):
                x = layer(x, None if gates is None else gates[2 * number : 2 * number + 2])
            return x

        return half(x) - half(2 * x) if self.siamese else half(x)


@pytest.mark.parametrize("siamese", [False, True])
@pytest.mark.parametrize("granularity", ["block", "unit"])
def test_each_addition_in_the_loops_of_neighbours_that_share_a_module_has_a_gate(
    granularity, siamese
):
    model, reference = (NeighboursShare(siamese).double() for _ in range(2))
    x = torch.randn(5, 4, dtype=torch.float64)
    handle = sd.apply(model, sd.Uniform(0.5), example=x, granularity=granularity)
    names = [f"layers.{n // 2}.own" if n % 2 == 0 else f"shared.{n // 4}" for n in range(8)]
    assert [block.name for block in handle.blocks] == names
    for gates in itertools.islice(itertools.product([False, True], repeat=8), 0, None, 7):
        with handle.forced(gates):
            torch.testing.assert_close(model.train()(x), reference(x, gates))
