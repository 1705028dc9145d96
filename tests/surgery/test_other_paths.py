"""Rewritten methods on paths that the example does not take, around the addition or before it.

The result is that of the original, or an error where the block had to be deferred.
"""

# ruff: noqa: SIM102, SIM108 (the form of the code is what is tested)

import copy
import itertools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import stochastic_depth as sd
from stochastic_depth.surgery.applied import applied_to
from stochastic_depth.tensors import tensors_in

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::stochastic_depth.errors.BypassedAdditionWarning"),
]
WIDTH = 4


def inputs(length):
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(length))


class Block(nn.Module):
    """Sequences of more than 4 elements, or `other=True`, take another path than the example."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.late, self.enabled = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), True
        self.config: SimpleNamespace | None = SimpleNamespace(add=True, keep=False)


class ChangesTheInnerGuard(Block):
    def forward(self, x, g=1.0, other=False, add=True):
        shortcut = x
        x = g * self.f(x)
        if self.enabled:
            add = add and shortcut.shape[1] <= 4
            if add:
                x = shortcut + x
            else:
                x = self.late(x)
        return x


class ChangesTheInnerGuardBeforeOthers(Block):
    def forward(self, x, g=1.0, other=False, add=True):
        h = x
        h = g * self.f(h)
        if self.enabled:
            add = add and x.shape[1] <= 4
            if add:
                x = x + h
            else:
                x = x * h
        return x


class JoinsIfAsked(Block):
    def join(self, x, h, add):
        if add:
            y = x + h
        else:
            y = h
        return y

    def forward(self, x, g=1.0, other=False):
        return self.join(x, g * self.f(x), not other)


class JoinsByItsLength(Block):
    def give(self, x, h):
        return self.late(x) if h is None else self.late(x * h)

    def join(self, x, h):
        if x.shape[1] <= 4:
            y = x + h
        else:
            y = self.give(x, h)
        return y

    def forward(self, x, g=1.0, other=False):
        return self.join(x, g * self.f(x))


class JoinsWhatItComputes(Block):
    def join(self, x, h, add):
        k = torch.tanh(h)
        if add:
            y = x + k
        else:
            y = k * 2
        return y

    def forward(self, x, g=1.0, other=False):
        return self.join(x, g * self.f(x), not other)


class ReturnsEarly(Block):
    def forward(self, x, g=1.0, other=False):
        h = self.f(x)
        if other:
            return x, h
        return x + g * h


class ReadsWhatMayBeNone(Block):
    def forward(self, x, g=1.0, other=False):
        config = None if other else self.config
        h = self.f(x)
        y = x + g * h
        if config is None:
            return y, None
        return y, ([h] if config.keep else None)


class ComparesWhatMayBeNone(Block):
    def forward(self, x, g=1.0, other=False, most=4):
        most = None if other else most
        h = g * self.f(x)
        if most is None:
            return x * 2
        if most > 3:
            x = x + h
        return x


class AsksInAComprehension(Block):
    def forward(self, x, g=1.0, other=False):
        h = self.f(x)
        y = x + g * h
        return y, [h if w else y for w in (True, False)] if other is not False else None


class AsksInAComprehensionOfTheSameName(Block):
    def forward(self, x, g=1.0, other=False, w=None):
        h = self.f(x) if w is None else self.f(x) * w
        y = x + g * h
        return y, [h if w else y for w in ((True, False) if other else ())]


class AsksTheOuterGuardFirst(Block):
    def forward(self, x, g=1.0, other=False):
        h = g * self.f(x)
        if self.config is not None:
            if self.config.add:
                x = x + h
        return x


def combined(x, h, add=True):
    return x + h if add else h


def combined_inside(x, h, add=True):
    return combined(x, h, add)


def combined_with(x, h, before=None):
    if before is not None:
        x = before(x)
    return x + h


class AddsInAFunctionIfAsked(Block):
    def forward(self, x, g=1.0, other=False):
        return combined(x, g * self.f(x), not other)


class AddsInAFunctionOfAFunction(Block):
    def forward(self, x, g=1.0, other=False):
        return combined_inside(x, g * self.f(x), not other)


class AddsToAnotherValue(Block):
    def forward(self, x, g=1.0, other=False):
        return combined_with(x, g * self.f(x), self.late if other else None)


LONG, OTHER, NEVER = "longer sequences", "other=True", "never"
ERRORS = {
    ChangesTheInnerGuard: LONG,
    ChangesTheInnerGuardBeforeOthers: LONG,
    JoinsByItsLength: LONG,
    JoinsIfAsked: OTHER,
    JoinsWhatItComputes: OTHER,
    ReturnsEarly: OTHER,
    ComparesWhatMayBeNone: OTHER,
    AddsInAFunctionIfAsked: OTHER,
    AddsInAFunctionOfAFunction: OTHER,
    ReadsWhatMayBeNone: NEVER,
    AsksInAComprehension: NEVER,
    AsksInAComprehensionOfTheSameName: NEVER,
    AddsToAnotherValue: NEVER,
    AsksTheOuterGuardFirst: NEVER,
}
"""Where a closed block does not reach its addition, which is an error."""
SLICED = (AsksInAComprehension, AsksTheOuterGuardFirst)
"""Are rewritten; the others are deferred."""


class Network(nn.Module):
    """Stacks what its last block returns."""

    def __init__(self, kind: type[Block]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(kind() for _ in range(2))

    def forward(self, x, gates=(1.0, 1.0), other=False):
        first, last = self.blocks
        x = first(x, gates[0])
        out = last(x if isinstance(x, torch.Tensor) else x[0], gates[1], other)
        return torch.stack(tensors_in(out))


@pytest.mark.parametrize("kind", ERRORS)
def test_another_path_than_that_of_the_example_is_that_of_the_original_or_an_error(kind):
    model = Network(kind)
    original = copy.deepcopy(model)
    handle = sd.apply(model, sd.Uniform(0.5), example=inputs(4))
    mechanism = "slice" if kind in SLICED else "deferred"
    assert {found.mechanism for found in applied_to(model).found} == {mechanism}
    for length, other, gates in itertools.product(
        (4, 7), (False, True), itertools.product((False, True), repeat=2)
    ):
        fails = {
            LONG: length > 4 and not all(gates),
            OTHER: other and not gates[1],  # of the last block, which alone is told
            NEVER: False,
        }
        expected = (
            pytest.raises(sd.errors.AdditionNotReachedError)
            if fails[ERRORS[kind]]
            else nullcontext()
        )
        with handle.forced(gates), expected:
            found = model(inputs(length), other=other)
            right = original(inputs(length), tuple(map(float, gates)), other)
            torch.testing.assert_close(found, right)


def test_an_outer_condition_is_asked_before_an_inner_one():
    model = Network(AsksTheOuterGuardFirst)
    handle = sd.apply(model, sd.Uniform(0.5), example=inputs(4))
    assert {found.mechanism for found in applied_to(model).found} == {"slice"}
    for block in model.blocks:
        block.config = None
    with handle.forced([False, False]):
        assert torch.equal(model(inputs(4))[0], inputs(4))


def plain_sum(x, h):
    h = nn.functional.dropout(h, 0.5, False)
    return x + h


class AddsInAPlainFunction(Block):
    def forward(self, x):
        return plain_sum(x, self.f(x))


def test_a_function_of_one_path_that_adds_is_called_by_a_rewritten_method():
    model = nn.Sequential(AddsInAPlainFunction(), AddsInAPlainFunction())
    handle = sd.apply(model, sd.Uniform(0.5), example=inputs(4))
    assert {found.mechanism for found in applied_to(model).found} == {"slice"}
    with handle.forced([False, False]):
        assert torch.equal(model(inputs(4)), inputs(4))


class JoinsByDefault(Block):
    def join(self, x, h, weight=0.5):
        return x + weight * h

    def forward(self, x):
        return self.join(x, self.f(x))


def test_a_default_of_the_method_that_adds_need_not_be_passed():
    model = nn.Sequential(JoinsByDefault(), JoinsByDefault())
    handle = sd.apply(model, sd.Uniform(0.5), example=inputs(4))
    assert {found.mechanism for found in applied_to(model).found} == {"call"}
    with handle.forced([False, False]):
        assert torch.equal(model(inputs(4)), inputs(4))
    with handle.forced([True, False]):
        torch.testing.assert_close(model(inputs(4)), inputs(4) + 0.5 * model[0].f(inputs(4)))


class Other(Block):
    """Another path than that of the example warns, and leaves alone what the example's does."""

    def forward(self, x, other=False):
        h = self.f(x)
        if not other:
            return x + h
        return self.late(x)


class TwoBranches(Block):
    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, first=True):
        h = self.f(x)
        k = self.g(x)
        if first:
            x = x + h
        else:
            x = self.late(h)
        if self.enabled:
            x = x + k
        return x


@pytest.mark.parametrize("kind", [Other, TwoBranches])
def test_a_warning_of_another_path_changes_nothing_of_what_a_closed_block_does(kind):
    model = nn.Sequential(kind(), kind())
    handle = sd.apply(model, sd.Uniform(0.5), example=inputs(4))
    assert {found.mechanism for found in applied_to(model).found} == {"slice"}
    x, called = inputs(4), []
    for part in model.modules():
        if isinstance(part, nn.Linear):
            part.register_forward_hook(lambda *_: called.append(1))
    with handle.forced([False, False]):
        assert torch.equal(model(x), x)
        assert model.eval()(x).data_ptr() == x.data_ptr()
    assert not called


# fmt: off
class CommentedOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.text = nn.Linear(WIDTH, WIDTH), ""

    def forward(self, x):
        self.text = """one
            two"""
        h = self.f(x)
#       h = h.relu()
        return x + h


class WithoutModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(WIDTH))

    def forward(self, x):
        h = x @ self.weight
#       h = h.relu()
        return x + h


# fmt: on


def test_a_branch_of_a_matrix_product_alone_is_skipped():
    model = nn.Sequential(WithoutModules(), WithoutModules())
    handle = sd.apply(model, sd.Uniform(0.5), example=inputs(4))
    assert {found.mechanism for found in applied_to(model).found} == {"slice"}
    with handle.forced([True, False]):
        torch.testing.assert_close(model(inputs(4)), 2 * inputs(4))


def test_comments_and_texts_at_any_column_are_those_of_the_source():
    model = nn.Sequential(CommentedOut(), CommentedOut())
    model(inputs(4))
    text = model[0].text
    sd.apply(model, sd.Uniform(0.5), example=inputs(4))
    assert {found.mechanism for found in applied_to(model).found} == {"slice"}
    model[0].text = ""
    model(inputs(4))
    assert model[0].text == text
