"""Fixed random subsets that keep the proportions of the classes."""

import torch
from torch import Tensor

from stochastic_depth.errors import DataError
from stochastic_depth.randomness import generator


def stratified(labels: Tensor, count: int, *key: int | str) -> tuple[Tensor, Tensor]:
    """Take `count` of the samples, from every class in proportion to its size.

    labels: int64 [n]. Returns the indices (taken, rest), each in ascending order: a pure function
    of the labels, the count and the key.
    """
    shuffled = torch.randperm(len(labels), generator=generator("split", *key))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    sizes = torch.bincount(labels)
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    # A sample's rank within its class, over the size of the class: the `count` smallest of all
    # contain the same share of each class.
    rank = torch.arange(len(labels)) - starts
    share = (rank + 0.5).double() / sizes.repeat_interleave(sizes)
    taken = torch.zeros(len(labels), dtype=torch.bool)
    taken[by_class[share.argsort(stable=True)[:count]]] = True
    return taken.nonzero()[:, 0], (~taken).nonzero()[:, 0]


def per_class(labels: Tensor, count: int, *key: int | str) -> tuple[Tensor, Tensor]:
    """Take exactly `count` samples of every class; otherwise as `stratified`.

    Raises:
        DataError: a class has fewer samples.
    """
    sizes = torch.bincount(labels)
    if int(sizes.min()) < count:
        label = int(sizes.argmin())
        raise DataError(
            f"class {label} has {int(sizes[label])} images, {count} of each class are to be held "
            "out: give the number of validation images yourself"
        )
    generated = generator("split", *key)
    taken = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(len(sizes)):
        members = (labels == label).nonzero()[:, 0]
        taken[members[torch.randperm(len(members), generator=generated)[:count]]] = True
    return taken.nonzero()[:, 0], (~taken).nonzero()[:, 0]


def check_count(what: str, count: int, most: int) -> None:
    """Refuse a number of training images outside 1..most.

    Raises:
        DataError: names `what`, its value and what would be right.
    """
    if not 1 <= count <= most:
        raise DataError(f"{what}={count}: choose from 1 to {most} training images")
