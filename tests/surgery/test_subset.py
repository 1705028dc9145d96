"""Subset gates where samples, time steps and channels are equally many: nothing tells by length."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth.surgery.applied import applied_to

pytestmark = pytest.mark.usefixtures("one_thread")

N = 4
"""Samples, time steps and channels alike."""


class Attention(nn.Module):
    """Attention over [samples, time, channels] with a mask [time, time], time first inside."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.value = nn.LayerNorm(N), nn.Linear(N, N)

    def forward(self, x, mask):
        h = self.norm(x)
        scores = torch.einsum("btc,bsc->bts", h, h) + mask
        steps = self.value(h).transpose(0, 1)
        return torch.einsum("bts,sbc->btc", scores.softmax(-1), steps)


class Sliced(nn.Module):
    """Uses a mask, a scale for each channel and a condition [samples, channels] in its method."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.value = nn.LayerNorm(N), nn.Linear(N, N)
        self.gamma = nn.Parameter(torch.rand(N))

    def forward(self, x, mask, condition):
        gamma = self.gamma * 2
        h = self.norm(x) + condition[:, None]
        scores = torch.einsum("btc,bsc->bts", h, h) + mask
        steps = self.value(h).transpose(0, 1)
        h = torch.einsum("bts,sbc->btc", scores.softmax(-1), steps)
        return x + gamma * h


class Choosing(nn.Module):
    """A variable of its branch is set under two conditions, and changed in place at last."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.value, self.twice = nn.LayerNorm(N), nn.Linear(N, N), False

    def forward(self, x, mask, condition):
        if self.twice:
            h = self.value(self.value(x))
        if not self.twice:
            h = self.value(torch.einsum("ts,bsc->btc", mask, self.norm(x)))
        h += x
        return h


class Looping(nn.Module):
    """Its branch changes a variable from outside in each turn of a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(nn.Linear(N, N) for _ in range(3))

    def forward(self, x, mask, condition):
        h = x
        for step in self.steps:
            h = torch.tanh(step(h)).transpose(0, 1)
            condition = condition * 0.5
            h = h + condition[None]
            h = torch.einsum("ts,sbc->btc", mask, h)
        return x + h


class Parallel(nn.Module):
    """Adds attention and feed-forward one after the other, and computes both from one value."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.value = nn.LayerNorm(N), Attention(), nn.Linear(N, N)

    def forward(self, x, mask, condition):
        h = self.norm(x) + condition[:, None]
        return x + self.attention(h, mask) + self.value(h)


class Adds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(N))

    def forward(self, x, steps):
        return x + steps.transpose(0, 1) * self.scale


class Handing(nn.Module):
    """Computes its branch, time first, for a module that adds it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.add = Attention(), Adds()

    def forward(self, x, mask, condition):
        steps = self.attention(x + condition[:, None], mask).transpose(0, 1)
        return self.add(x, steps)


SOURCELESS = """
def forward(self, x, mask, condition):
    return x + self.attention(x + condition[:, None], mask)
"""


class Sourceless(nn.Module):
    """Nothing knows its source."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    made: ClassVar[dict] = {}
    exec(SOURCELESS, {}, made)
    forward = made["forward"]


class Model(nn.Module):
    def __init__(self, kind) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(N, N)
        self.blocks = nn.ModuleList(kind() for _ in range(3))

    def forward(self, x, mask, condition):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, mask, condition)
        return x


class Trunk(nn.Module):
    """Adds itself, in a loop; uses the mask and the condition on what its modules give."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(N, N)
        self.blocks = nn.ModuleList(nn.ModuleList([Attention()]) for _ in range(3))
        self.gamma = nn.Parameter(torch.rand(N))

    def forward(self, x, mask, condition):
        x = self.stem(x)
        for (attention,) in self.blocks:
            x = x + self.branch(attention, x, mask, condition)
        return x

    def branch(self, attention, x, mask, condition):
        h = attention(x, mask) * condition.unsqueeze(1)
        return torch.einsum("ts,bsc->btc", mask, h) * self.gamma


def inputs(time: int = N):
    torch.manual_seed(1)
    x, mask = torch.randn(N, time, N), torch.randn(time, time)
    return x.double(), mask.double(), torch.randn(N, N).double()


def one_block(model, n, x, mask, condition):
    """The original block, on all samples."""
    if isinstance(model, Trunk):
        return x + model.branch(model.blocks[n][0], x, mask, condition)
    return model.blocks[n](x, mask, condition)


WAYS = {
    Sliced: "slice",
    Choosing: "slice",
    Looping: "slice",
    Handing: "call",
    Parallel: "deferred",
    Sourceless: "deferred",
    Trunk: "deferred",
}


@pytest.mark.parametrize("kind", WAYS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("times", [(N, N), (3, N)], ids=["equal", "equal-later"])
def test_every_sample_gets_the_branches_that_were_drawn_for_it(kind, times):
    make = Trunk if kind is Trunk else functools.partial(Model, kind)
    original, model = make().double(), make().double()
    on_example, later = times
    handle = sd.apply(model, sd.Uniform(0.5), example=inputs(on_example), gate="subset")
    assert {block.mechanism for block in applied_to(model).found} == {WAYS[kind]}
    x, mask, condition = inputs(later)
    for _ in range(12):
        found = model(x, mask, condition)
        expected = original.stem(x)
        for n, keep in enumerate(handle.gates):
            branch = one_block(original, n, expected, mask, condition)
            expected = torch.where(keep[:, None, None], branch, expected)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_mask_that_comes_later_is_not_taken_for_samples():
    class Optional(Sliced):
        def forward(self, x, mask=None):
            h = self.norm(x)
            if mask is not None:
                h = torch.einsum("ts,bsc->btc", mask, h)
            return x + self.value(h)

    model = nn.Sequential(Optional()).double()
    x, mask, _ = inputs()
    sd.apply(model, sd.Uniform(0.5), example=x, gate="subset")
    handle = sd.handle_of(model)
    keep = torch.tensor([[True, False, True, False]])
    with (
        handle.forced(keep),
        pytest.raises(sd.errors.GateError, match="that the example did not have"),
    ):
        model[0](x, mask)


class Across(Sliced):
    """Is handed the condition as [channels, samples]."""

    def forward(self, x, mask, condition):
        return x + (self.value(x) + self.norm(condition.T)[:, None])


class AcrossModel(Model):
    def __init__(self) -> None:
        super().__init__(Across)

    def forward(self, x, mask, condition):
        x, condition = self.stem(x), condition.T
        for block in self.blocks:
            x = block(x, mask, condition)
        return x


def test_samples_in_another_dimension_are_selected_where_they_come_first():
    model, original = AcrossModel().double(), AcrossModel().double()
    handle = sd.apply(model, sd.Uniform(0.5), example=inputs(), gate="subset")
    x, mask, condition = inputs()
    found, expected = model(x, mask, condition), original.stem(x)
    for n, keep in enumerate(handle.gates):
        branch = original.blocks[n](expected, mask, condition.T)
        expected = torch.where(keep[:, None, None], branch, expected)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


class Adding(nn.Module):
    """Calls `meanwhile` in each pass, and remembers how many samples its branch got."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(N, N)
        self.meanwhile: Callable[[], object] = lambda: None
        self.sizes: list[int] = []

    def forward(self, x):
        self.meanwhile()
        return x + self.branch(x)

    def branch(self, x):
        self.sizes.append(len(x))
        return self.linear(x)


def test_a_proof_in_one_thread_leaves_the_samples_of_another_thread_selected():
    training, proved, x = Adding(), Adding(), torch.randn(N, N)
    sd.apply(training, sd.Uniform(0.5), example=x, gate="subset", balance=True)
    training.sizes.clear()
    with ThreadPoolExecutor(1) as other:
        proved.meanwhile = lambda: other.submit(training, x).result()
        sd.apply(proved, sd.Uniform(0.5), example=x, gate="subset")
    assert len(training.sizes) > 20
    assert set(training.sizes) == {N // 2}


class Collects(nn.Module):
    """Returns what the branches are computed from, if asked for it after `sd.apply`."""

    collects = False

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(3))
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        collected = []
        for norm, layer in zip(self.norms, self.layers, strict=True):
            h = norm(x)
            collected.append(h)
            x = x + layer(h).tanh()
        self.last = collected[-1]
        return (x, *collected) if self.collects else x


def test_a_value_that_has_the_drawn_samples_only_is_used_nowhere_else():
    x = torch.randn(5, 6)
    model = Collects()
    handle = sd.apply(model, sd.Uniform(0.5), example=x, gate="subset")
    for step in range(4):
        handle.step = step
        assert model(x).shape == x.shape  # nothing asks for what is left over
    drawn = handle.gates[-1].sum()
    assert drawn < 5
    with pytest.raises(sd.errors.GateError, match="used outside of it"):
        print(model.last)
    model.collects = True
    with pytest.raises(sd.errors.GateError, match=r"shape \[\d, 6\].* an example that takes this"):
        model(x)
    again = Collects()
    again.collects = True
    sd.apply(again, sd.Uniform(0.5), example=x, gate="subset")
    assert [out.shape for out in again(x)] == [x.shape] * 4
