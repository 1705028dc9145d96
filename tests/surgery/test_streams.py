"""Models with two streams: parts of a value, or two values, that are added to in turn."""

import itertools

import pytest
import torch
from torch import nn

import stochastic_depth as sd

X = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Reversible(nn.Module):
    """A block of a reversible network: each half of the values is changed by the other."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, a, b):
        a = a + torch.tanh(self.f(b))
        b = b + torch.tanh(self.g(a))
        return a, b

    def by_hand(self, a, b, f, g):
        a = a + f * torch.tanh(b @ self.f.weight.T + self.f.bias)
        return a, b + g * torch.tanh(a @ self.g.weight.T + self.g.bias)


class Joint(Reversible):
    """The first branch sees both streams, and the second one its result."""

    def forward(self, a, b):
        a = a + torch.tanh(self.f(a + b))
        b = b + torch.tanh(self.g(a))
        return a, b

    def by_hand(self, a, b, f, g):
        a = a + f * torch.tanh((a + b) @ self.f.weight.T + self.f.bias)
        return a, b + g * torch.tanh(a @ self.g.weight.T + self.g.bias)


class OfHalves(Reversible):
    """The halves come as one value."""

    def forward(self, x):
        return torch.cat(super().forward(*x.chunk(2, -1)), -1)


class AtOnce(Reversible):
    """Each stream is changed by the other as that was before."""

    def forward(self, a, b):
        new = a + torch.tanh(self.f(b))
        b = b + torch.tanh(self.g(a))
        return new, b

    def by_hand(self, a, b, f, g):
        new = a + f * torch.tanh(b @ self.f.weight.T + self.f.bias)
        return new, b + g * torch.tanh(a @ self.g.weight.T + self.g.bias)


class Streams(nn.Module):
    """Hands two values from block to block."""

    def __init__(self, kind: type[Reversible]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(3))

    def forward(self, x):
        a, b = x.chunk(2, -1)
        for block in self.blocks:
            a, b = block(a, b)
        return torch.cat([a, b], -1)


class Trunk(Streams):
    """Adds to its halves itself."""

    def forward(self, x):
        a, b = x.chunk(2, -1)
        for block in self.blocks:
            a = a + torch.tanh(block.f(b))
            b = b + torch.tanh(block.g(a))
        return torch.cat([a, b], -1)


class OneLayer(nn.Module):
    """One layer gives what is added to both streams, and runs for neither of them alone."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, a, b):
        return self.out(torch.tanh(self.mix(torch.cat([a, b], -1)))).chunk(2, -1)

    def by_hand(self, a, b, f, g):
        h = torch.tanh(torch.cat([a, b], -1) @ self.mix.weight.T + self.mix.bias)
        h = h @ self.out.weight.T + self.out.bias
        return a + f * h[:, :4], b + g * h[:, 4:]


class TrunkOfOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(OneLayer() for _ in range(3))

    def forward(self, x):
        a, b = x.chunk(2, -1)
        for block in self.blocks:
            da, db = block(a, b)
            a, b = a + da, b + db
        return torch.cat([a, b], -1)


def by_hand(blocks, gates, x):
    a, b = x.chunk(2, -1)
    for block, (f, g) in zip(blocks, gates, strict=True):
        a, b = block.by_hand(a, b, f, g)
    return torch.cat([a, b], -1)


def gradients(output, model):
    return torch.autograd.grad(
        output.pow(2).sum(), list(model.parameters()), allow_unused=True, materialize_grads=True
    )


MODELS = {
    "sequential": lambda: nn.Sequential(OfHalves(), OfHalves(), OfHalves()),
    "reversible": lambda: Streams(Reversible),
    "at once": lambda: Streams(AtOnce),
    "joint": lambda: Streams(Joint),
    "trunk": lambda: Trunk(Reversible),
    "one layer": TrunkOfOne,
}


@pytest.mark.parametrize("name", MODELS)
def test_every_pattern_of_gates_is_the_sum_written_out(name):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    blocks = list(model if name == "sequential" else model.blocks)
    handle = sd.apply(model, sd.Uniform(0.7), example=X)
    assert [block.name.split(".")[-1] for block in handle.blocks] == ["0", "1", "2"]
    for pattern in itertools.product([False, True], repeat=3):
        gates = [(gate, gate) for gate in pattern]
        expected = by_hand(blocks, gates, X)
        with handle.forced(list(pattern)):
            output = model.train()(X)
        assert torch.allclose(output, expected, rtol=0, atol=1e-12)
        pairs = zip(gradients(output, model), gradients(expected, model), strict=True)
        assert all(torch.allclose(ours, truth, atol=1e-12) for ours, truth in pairs)
    expected = by_hand(blocks, [(0.7, 0.7)] * 3, X)
    assert torch.allclose(model.eval()(X), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_a_closed_block_of_two_streams_runs_nothing(name):
    model = MODELS[name]().double()
    handle = sd.apply(model, example=X)
    called = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, *_: called.append(module))
    with handle.forced([False] * len(handle.blocks)):
        assert torch.equal(model.train()(X), X)
    assert not called


def test_half_a_coupling_is_listed():
    class Coupling(Reversible):
        def forward(self, x):
            one, other = x.chunk(2, -1)
            return torch.cat([other, one + self.f(other)], -1)

    class Plain(Reversible):
        def forward(self, x):
            return x + torch.cat([self.f(x[:, 4:]), self.g(x[:, :4])], -1)

    plan = sd.plan(nn.Sequential(Plain(), Coupling(), Plain(), Coupling()).double(), X)
    assert [block.name for block in plan.blocks] == ["0", "2"]
    (rejected,) = plan.rejected
    assert "'1' and 1 more" in rejected
    assert "Coupling.forward" in rejected
    assert "a one-sided coupling" in rejected


class Discards(Streams):
    """Drops its second stream in the end, to which the last block adds all the same."""

    def forward(self, x):
        a, b = x.chunk(2, -1)
        for block in self.blocks:
            a, b = block(a, b)
        return a


class Both(Reversible):
    """One module computes what is added to both streams, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, a, b):
        first, second = torch.tanh(self.f(torch.cat([a, b], -1))).chunk(2, -1)
        a = a + first
        b = b + second
        first, second = torch.tanh(self.g(torch.cat([a, b], -1))).chunk(2, -1)
        a = a + first
        b = b + second
        return a, b

    def by_hand(self, a, b, f, g):
        for gate, layer in ((f, self.f), (g, self.g)):
            inner = torch.tanh(torch.cat([a, b], -1) @ layer.weight.T + layer.bias)
            a, b = a + gate * inner[:, :4], b + gate * inner[:, 4:]
        return a, b


def test_a_stream_that_is_dropped_in_the_end_keeps_no_block_open():
    torch.manual_seed(0)
    model = Discards(Both).double()
    handle = sd.apply(model, example=X)
    for pattern in itertools.product([False, True], repeat=3):
        expected = by_hand(model.blocks, [(gate, gate) for gate in pattern], X)[:, :4]
        with handle.forced(list(pattern)):
            output = model.train()(X)
        assert torch.allclose(output, expected, rtol=0, atol=1e-12)
        pairs = zip(gradients(output, model), gradients(expected, model), strict=True)
        assert all(torch.allclose(ours, truth, atol=1e-12) for ours, truth in pairs)
    called = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, *_: called.append(module))
    with handle.forced([False] * 3):
        model(X)
    assert not called


class Inverting(torch.autograd.Function):
    """Keeps outputs alone, as implementations of reversible layers do."""

    @staticmethod
    def forward(ctx, layers, a, b):
        for layer in layers:
            a, b = layer(a, b)
        return a, b

    @staticmethod
    def backward(ctx, *gradients):
        raise AssertionError("takes off again what each layer has added, and is not reached here")


class Inverted(nn.Module):
    def __init__(self, always):
        super().__init__()
        self.layers = nn.ModuleList(Reversible() for _ in range(3))
        self.always = always

    def forward(self, x):
        a, b = x.chunk(2, -1)
        if self.training or self.always:
            return torch.cat(Inverting.apply(self.layers, a, b), -1)
        for layer in self.layers:
            a, b = layer(a, b)
        return torch.cat([a, b], -1)


@pytest.mark.parametrize("always", [True, False])
def test_what_is_added_within_a_function_with_a_backward_pass_of_its_own_is_refused(always):
    """Its backward pass would take off again what a closed block never added."""
    model = Inverted(always).double()
    with pytest.raises(
        sd.errors.ApplyError, match=r"within Inverting, an autograd\.Function .* without gates"
    ):
        sd.apply(model, sd.Uniform(0.5), example=X)


class Lookup(nn.Module):
    """A coarse stream looks into a fine one, from which it was made smaller, and is looked into."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList((nn.Linear(8, 8), nn.Linear(8, 8))) for _ in range(2)
        )
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        fine = x[:, None].expand(-1, 4, -1) * torch.arange(1.0, 5, dtype=x.dtype)[:, None]
        coarse = nn.functional.interpolate(fine.transpose(1, 2), 2).transpose(1, 2)
        for down, up in self.layers:
            coarse = down(coarse + fine[:, ::2]) + coarse
            fine = up(fine + coarse.repeat(1, 2, 1)) + fine
        return self.head(coarse.mean(1) + torch.tanh(fine).mean(1))

    def by_hand(self, x, gates):
        fine = torch.stack([n * x for n in range(1, 5)], 1)
        coarse = fine[:, ::2]
        for (down, up), gate in zip(self.layers, gates, strict=True):
            coarse = coarse + gate * ((coarse + fine[:, ::2]) @ down.weight.T + down.bias)
            fine = fine + gate * ((fine + coarse.repeat(1, 2, 1)) @ up.weight.T + up.bias)
        pooled = coarse.mean(1) + torch.tanh(fine).mean(1)
        return pooled @ self.head.weight.T + self.head.bias


def test_of_two_sizes_made_by_making_one_smaller_each_layer_is_a_block():
    torch.manual_seed(0)
    model = Lookup().double()
    handle = sd.apply(model, sd.Uniform(0.7), example=X)
    assert [block.name for block in handle.blocks] == ["layers.0", "layers.1"]
    for pattern in itertools.product([False, True], repeat=2):
        with handle.forced(list(pattern)):
            output = model.train()(X)
        assert torch.allclose(output, model.by_hand(X, pattern), rtol=0, atol=1e-12)


class Biased(nn.Module):
    """Adds a bias that it is given to what it computes, and mixes the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, bias):
        return self.two(torch.tanh(self.one(x) + bias))


def test_a_bias_that_is_given_is_no_stream():
    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Biased() for _ in range(2))
            self.bias = nn.Linear(8, 8)

        def forward(self, x):
            bias = self.bias(torch.ones_like(x))
            for block in self.blocks:
                x = block(x, bias) + x
            return x

    model = Trunk().double()
    handle = sd.apply(model, example=X)
    assert [block.name for block in handle.blocks] == ["blocks.0", "blocks.1"]
    with handle.forced([False, False]):
        assert torch.equal(model.train()(X), X)
