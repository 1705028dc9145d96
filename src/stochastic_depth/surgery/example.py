"""The example inputs with which a model is inspected."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from stochastic_depth.surgery.preserve import seed_everything
from stochastic_depth.tensors import tensors_in

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""The inputs of one forward call: one tensor, positional arguments, or keyword arguments."""


def caller(model: Callable[..., Any], example: Example) -> Callable[..., Any]:
    """A function that calls `model` on a copy of `example`, each time from the same random state.

    Its argument, 0 if not given, chooses another state.
    """

    def call(seed: int = 0) -> Any:
        held = {id(x): x.detach().clone().requires_grad_(x.requires_grad) for x in tensors}
        given = copy.deepcopy(example, held)  # which the model may change in place
        seed_everything(seed)
        if isinstance(given, Mapping):
            return model(**given)
        return model(*given) if isinstance(given, tuple) else model(given)

    tensors = tensors_in(example)
    return call


def on_meta(model: nn.Module, example: Example) -> bool:
    """Whether there are no values to compare: weights or inputs on the meta device."""
    tensors = [*model.parameters(), *model.buffers(), *tensors_in(example)]
    return any(tensor.device.type == "meta" for tensor in tensors)
