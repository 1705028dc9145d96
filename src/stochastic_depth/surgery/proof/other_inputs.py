"""Other inputs than the example, of the same shapes.

On them a closed block shows what it leaves undone: a mask that it keeps on a shared object for
later blocks, or a change in place that the example happens not to need.
"""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from stochastic_depth.surgery.example import Example, caller
from stochastic_depth.surgery.proof.call_counts import calls_if_finite
from stochastic_depth.tensors import replace_tensors, tensors_in


def other_inputs(model: nn.Module, example: Example, usual: Counter[str] | None) -> Example:
    """Inputs of `model` other than the example; the example itself if it cannot run on others.

    Samples are in another order. If the model has finite outputs for them, numbers have random
    signs too, and the first sample ends with a zero, as padding does. If the example is one sample,
    they are two where the model can run on two, to tell a batch from what is broadcast to it. The
    model takes the same path on these inputs.

    Args:
        usual: how often each module is called on the example; None if that is not known.
    """
    samples = next((len(tensor) for tensor in tensors_in(example) if tensor.ndim), 0)
    changes = (_two_samples, *CHANGES) if samples == 1 else CHANGES
    for change in changes:
        other = _changed(example, samples, change)
        calls = calls_if_finite(model, caller(model, other))
        if calls is not None and usual in (calls, None):
            return other
    return example


def _changed(example: Example, samples: int, change: Callable[[Tensor], Tensor]) -> Example:
    """`example` with `change` applied to each tensor that holds the samples first."""

    def new(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0 or len(tensor) != samples or tensor.layout != torch.strided:
            return tensor
        return change(tensor.detach()).requires_grad_(tensor.requires_grad)

    return replace_tensors(example, new)


def _two_samples(tensor: Tensor) -> Tensor:
    """Two different samples, made of one: [1, ...] -> [2, ...]."""
    return _with_signs(torch.cat([tensor, _in_another_order(tensor)]))


def _in_another_order(tensor: Tensor) -> Tensor:
    return tensor.roll(1, next((n for n, length in enumerate(tensor.shape) if length > 1), 0))


def _with_signs(tensor: Tensor) -> Tensor:
    changed = _in_another_order(tensor)
    if tensor.is_floating_point():
        source = torch.Generator("cpu").manual_seed(0)
        flips = torch.randint(2, tensor.shape, generator=source, device="cpu")
        changed = changed * (1 - 2 * flips).to(tensor)
    padded = tensor.ndim > (2 if tensor.is_floating_point() else 1) and tensor.dtype != torch.bool
    if padded and tensor.numel():
        changed[0, -1] = 0
    return changed


CHANGES = _with_signs, _in_another_order
