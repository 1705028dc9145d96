"""Prove which dimension is the batch, for gates of single samples."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from stochastic_depth.errors import ApplyError, UnsupportedBlockError
from stochastic_depth.surgery.blocks import Found
from stochastic_depth.surgery.bypass import bypassed
from stochastic_depth.surgery.example import Example, caller
from stochastic_depth.surgery.preserve import preserve_state
from stochastic_depth.tensors import largest_difference, tensors_in


def check_samples(model: nn.Module, example: Example, found: Sequence[Found], batch: int) -> None:
    """Prove that the first dimension is the batch: half of the samples alone give the same.

    Raises:
        ApplyError: when they do not, as time steps do not, or there are too few samples to see.
    """
    remedy = 'use gate="batch", or put the batch first'
    if batch < 2:
        raise ApplyError(
            "gates for single samples need an example of at least two samples, to see that its "
            f"first dimension is the batch; this one has {batch}"
        )
    half = (batch + 1) // 2
    keep = torch.ones(half, dtype=torch.bool, device="cpu")

    def first(value: Any) -> Any:
        is_one = isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch
        return value[:half] if is_one else value

    with preserve_state(model), torch.no_grad():
        model.eval()
        with bypassed(found, torch.ones(batch, dtype=torch.bool, device="cpu")):
            whole = tensors_in(caller(model, example)())
        try:
            with bypassed(found, keep):
                part = tensors_in(caller(model, tree_map(first, example))())
        except UnsupportedBlockError:
            raise
        except Exception as error:
            raise ApplyError(
                f"gates for single samples need the batch as first dimension of all inputs: with "
                f"{half} of {batch} {type(model).__name__} fails ({type(error).__name__}: "
                f"{error}); {remedy}"
            ) from error
    expected = [x[: len(y)] if x.ndim and y.ndim else y for x, y in zip(whole, part, strict=True)]
    compared = [(x, y) for x, y in zip(expected, part, strict=True) if x.ndim and y.ndim]
    same = all(x.shape == y.shape for x, y in compared)
    if not same or largest_difference(*map(list, zip(*compared, strict=True))) > 1e-3:
        raise ApplyError(
            f"the first dimension of the inputs of {type(model).__name__} is not the batch: the "
            f"first {half} of {batch} alone give other outputs than among the others, as time "
            f"steps do and samples do not; {remedy}"
        )
