"""Blocks that are deferred: every form that can be rewritten, and those that cannot."""

import functools
import itertools
import sys

import pytest
import torch
from test_foreign import ONE_ADDITION, WIDTH, SaysHow, X, close, closed, network
from torch import nn

import stochastic_depth as sd
from stochastic_depth.surgery.apply import applied_to
from stochastic_depth.surgery.find import find_blocks

pytestmark = pytest.mark.usefixtures("one_thread")

FORMS = [kind for kind in ONE_ADDITION if kind is not SaysHow]


@pytest.fixture
def all_deferred(monkeypatch):
    """Whatever could be rewritten is deferred all the same."""
    module = sys.modules["stochastic_depth.surgery.apply"]
    monkeypatch.setattr(module, "find_blocks", _never_rewriting)


def note(called, number, *_):
    called.append(number)


def _never_rewriting(*args, rewrite, **kwargs):
    return find_blocks(*args, **kwargs, rewrite=False)


@pytest.mark.usefixtures("all_deferred")
@pytest.mark.parametrize("kind", FORMS)
def test_every_pattern_of_gates_gives_outputs_and_gradients_of_the_surviving_network(kind):
    original, model = network(kind), network(kind)
    handle = sd.apply(model, sd.LinearDecay(0.5), example=X)
    assert [block.mechanism for block in applied_to(model).found] == ["deferred"] * 3
    stem, *blocks = original
    for pattern in itertools.product((False, True), repeat=3):
        called = []
        hooks = [
            part.register_forward_hook(functools.partial(note, called, number))
            for number, block in enumerate(list(model)[1:])
            for part in (block.norm, block.one, block.two)
        ]
        close(handle, pattern)
        h, expected = model.forward(X), stem(X)
        for block, is_open in zip(blocks, pattern, strict=True):
            expected = block(expected) if is_open else closed(block, expected)
        torch.testing.assert_close(h, expected, rtol=1e-12, atol=1e-12)
        assert not {number for number in called if not pattern[number]}
        for hook in hooks:
            hook.remove()
        for network_, out in ((model, h), (original, expected)):
            network_.zero_grad()
            out.square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), original.parameters(), strict=True):
            if q.grad is None:
                assert p.grad is None, (name, pattern)
            else:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


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
        close(handle, pattern)
        expected = model.stem(X)
        for is_open, (first, second) in zip(pattern, model.layers, strict=True):
            for part in (first, second) if is_open else ():
                expected = part(expected) + expected
        torch.testing.assert_close(model.forward(X), expected, rtol=1e-12, atol=1e-12)
    model.eval()
    expected = model.stem(X)
    for first, second in model.layers:
        expected = expected + 0.5 * first(expected)
        expected = expected + 0.5 * second(expected)
    torch.testing.assert_close(model(X), expected, rtol=1e-12, atol=1e-12)
