import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from stochastic_depth.tensors import (
    largest_difference,
    map_structure,
    replace_tensors,
    tensors_in,
)


@dataclass(frozen=True)
class Pair:
    left: Tensor
    rest: Any = None


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class OneSlot(Slotted):
    __slots__ = "second"  # a string is one name

    def __init__(self, value: Any, second: Any) -> None:
        super().__init__(value)
        self.second = second


A, B, C = torch.tensor([1.0, 2.0]), torch.tensor([3.0]), torch.tensor([4])
VALUES = {
    "a tensor": A,
    "nested": [(A, {"b": B}), None, 3, "word"],
    "a dataclass": Pair(A, {"b": Pair(B)}),
    "an object": SimpleNamespace(a=A, inside=SimpleNamespace(b=[B])),
    "slots": Slotted([A, Slotted(B)]),
    "a slot declared by a string": OneSlot(None, [A, B]),
    "a subclass of a named tuple": PackedSequence(A, B),
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_tensors_are_found_in_any_container_and_replaced_in_a_copy(value):
    expected = [A] if value is A else [A, B]
    assert [id(tensor) for tensor in tensors_in(value)] == [id(tensor) for tensor in expected]
    doubled = replace_tensors(value, lambda tensor: 2 * tensor)
    assert type(doubled) is type(value)
    assert all(map(torch.equal, tensors_in(doubled), [2 * tensor for tensor in expected]))
    assert [id(tensor) for tensor in tensors_in(value)] == [id(tensor) for tensor in expected]


def test_a_container_in_which_nothing_changes_is_the_same_object():
    inside = [A, {"b": B}], slice(0, C), PackedSequence(A, B), None, Pair(A)
    assert map_structure(lambda tensor, _: tensor, inside) is inside
    changed = map_structure(lambda tensor, _: 2 * tensor if tensor is C else tensor, inside)
    assert changed[1] == slice(0, torch.tensor([8]))
    assert [new is old for new, old in zip(changed, inside, strict=True)] == [
        n != 1 for n in range(5)
    ]


def test_modules_and_cycles_are_not_looked_into():
    around = SimpleNamespace(a=A, model=nn.Linear(2, 2))
    around.itself = around
    assert [id(tensor) for tensor in tensors_in(around)] == [id(A)]


@pytest.mark.parametrize(
    ("one", "other", "difference"),
    [
        ([A, C], [A.clone(), C.clone()], 0),
        ([A], [A + torch.tensor([0.0, 0.5])], 0.25),
        ([torch.tensor([1j])], [torch.tensor([2j])], 1),
        ([torch.tensor([math.nan, 1])], [torch.tensor([math.nan, 1])], 0),
        ([torch.tensor([math.nan, 1])], [torch.tensor([1.0, 1])], math.inf),
        ([A], [A[:1]], math.inf),
        ([A, B], [A], math.inf),
    ],
)
def test_the_largest_difference_is_relative_to_the_largest_value(one, other, difference):
    assert largest_difference(one, other) == difference
