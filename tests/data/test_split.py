import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stochastic_depth.data.dataset import check_count, per_class, stratified
from stochastic_depth.errors import DataError


@settings(deadline=None)
@given(
    labels=st.lists(st.integers(0, 6), min_size=1, max_size=200), share=st.floats(0, 1), data=...
)
def test_a_stratified_choice_is_a_partition_in_proportion_to_the_classes(
    labels: list[int], share: float, data: int
):
    labels = torch.tensor(labels)
    count = round(share * len(labels))
    taken, rest = stratified(labels, count, data)
    assert len(taken) == count
    assert sorted(taken.tolist() + rest.tolist()) == list(range(len(labels)))
    for label in range(7):
        size, found = int((labels == label).sum()), int((labels[taken] == label).sum())
        assert abs(found - count * size / len(labels)) <= 1.5


def test_equal_classes_give_equal_numbers():
    labels = torch.arange(50).repeat(20)
    taken, _ = stratified(labels, 250, "key")
    assert labels[taken].bincount().tolist() == [5] * 50


def test_the_choice_is_random_but_fixed():
    labels = torch.zeros(1000, dtype=torch.int64)
    first, _ = stratified(labels, 500, "a")
    again, _ = stratified(labels, 500, "a")
    other, _ = stratified(labels, 500, "b")
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # The mean of 500 of 0..999 without replacement has a standard deviation of 9.1.
    assert abs(first.double().mean() - 499.5) < 40


def test_the_choice_never_changes_between_versions():
    taken, _ = stratified(torch.arange(3).repeat(10), 6, "golden")
    assert taken.tolist() == [0, 2, 13, 18, 19, 29]


def test_per_class_takes_exactly_that_many_of_each():
    labels = torch.tensor([0] * 9 + [1] * 5 + [2] * 30)
    taken, rest = per_class(labels, 4, "key")
    assert labels[taken].bincount().tolist() == [4, 4, 4]
    assert sorted(taken.tolist() + rest.tolist()) == list(range(44))


def test_too_small_a_class_is_named():
    with pytest.raises(DataError, match="class 1 has 2 images, 3 of each"):
        per_class(torch.tensor([0, 0, 0, 1, 1]), 3, "key")


@pytest.mark.parametrize("count", [-1, 0, 11])
def test_a_count_out_of_range_is_refused(count):
    with pytest.raises(DataError, match=f"validation={count}: choose from 1 to 10"):
        check_count("validation", count, 10)
