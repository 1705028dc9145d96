"""Example inputs of a model, and calls of the model on them."""

import copy
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from stochastic_depth.surgery.model_state import seed_everything
from stochastic_depth.tensors import tensors_in

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""The inputs of one forward call: one tensor, positional arguments, or keyword arguments."""


NEED_GRADIENTS: WeakSet[nn.Module] = WeakSet()
"""The models that run only with gradients enabled, because they differentiate in forward."""


def gradients_if_needed(model: Callable[..., Any]) -> torch.set_grad_enabled:
    """While entered, gradients are enabled if they were before, or if `model` needs them."""
    return torch.set_grad_enabled(torch.is_grad_enabled() or model in NEED_GRADIENTS)


def caller(model: Callable[..., Any], example: Example) -> Callable[..., Any]:
    """A function that calls `model` on a copy of `example`, each time from the same random state.

    The function has one argument, a seed, by default 0.
    """

    def call(seed: int = 0) -> Any:
        copies = {id(x): x.detach().clone().requires_grad_(x.requires_grad) for x in tensors}
        given = copy.deepcopy(example, copies)  # which the model may change in place
        seed_everything(seed)
        with gradients_if_needed(model):
            if isinstance(given, Mapping):
                return model(**given)
            return model(*given) if isinstance(given, tuple) else model(given)

    tensors = tensors_in(example)
    return call


def sum_of_outputs(output: Any) -> Tensor | None:
    """The sum of all tensors in `output` that have a gradient; None without any."""
    sums = [tensor.float().sum() for tensor in tensors_in(output) if tensor.requires_grad]
    return torch.stack(sums).sum() if sums else None


def on_meta(model: nn.Module, example: Example) -> bool:
    """Whether weights or inputs are on the meta device, so that there are no values to compare."""
    tensors = [*model.parameters(), *model.buffers(), *tensors_in(example)]
    return any(tensor.device.type == "meta" for tensor in tensors)
