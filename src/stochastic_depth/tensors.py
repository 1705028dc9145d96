"""The tensors in any value, and how far two lists of them are apart."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def tensors_in(value: object) -> list[Tensor]:
    """All tensors in nested containers, in order."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def largest_difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The largest difference of tensors that belong together, relative to each one's largest value.

    Infinite where one has a number and the other has none (not-a-number), or another infinity.
    """
    largest = 0.0
    for old, new in zip(expected, found, strict=True):
        if not old.numel() or torch.equal(old, new):
            continue
        old, new = old.detach().double(), new.detach().double()
        same = (old == new) | (old.isnan() & new.isnan())
        apart = (new - old).abs()[~same]
        if apart.numel():
            finite = old[old.isfinite()].abs()
            scale = max(finite.max().item() if finite.numel() else 0.0, 1e-30)
            relative = apart.nan_to_num(nan=torch.inf).max().item() / scale
            largest = max(largest, relative)
    return largest
