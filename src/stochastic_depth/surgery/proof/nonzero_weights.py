"""Make every branch affect the outputs of a model while it is compared with the original.

Branches are often initialised to zero or nearly zero: by a last convolution or a gain of zero, the
LayerScale of 1e-6 of ConvNeXt, or the gates of a diffusion transformer. Then a wrong block has the
same outputs as a right one.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.surgery.model_state import has_content
from stochastic_depth.surgery.proof.call_counts import calls_if_finite

_VANISHING = 1e-3
"""Parameters are replaced if none of their values is larger than this."""

Originals = list[tuple[nn.Parameter, Tensor]]
"""Parameters, each with a copy of its original value."""


@contextmanager
def nonzero_weights(
    model: nn.Module, run: Callable[..., Any], usual: Counter[str] | None
) -> Iterator[None]:
    """While entered, trainable parameters that are zero or nearly zero have random values.

    The values are the same each time. If the model cannot run with them, or takes another path,
    nothing is replaced.

    Args:
        run: calls the model on the example.
        usual: how often that calls each module; None if that is not known.
    """
    originals = [
        (parameter, parameter.detach().clone())
        for parameter in model.parameters()
        if parameter.requires_grad and _vanishes(parameter)
    ]
    try:
        _randomise(originals)
        if originals and usual is not None and calls_if_finite(model, run) != usual:
            _restore(originals)
        yield
    finally:
        _restore(originals)


def _vanishes(parameter: Tensor) -> bool:
    plain = has_content(parameter) and parameter.is_floating_point() and parameter.numel() > 0
    return plain and parameter.detach().abs().max().item() <= _VANISHING


def _randomise(originals: Originals) -> None:
    generator = torch.Generator("cpu").manual_seed(0)
    for parameter, _ in originals:
        parameter.data.copy_(_values_like(parameter, generator))


def _restore(originals: Originals) -> None:
    for parameter, value in originals:
        parameter.data.copy_(value)


def _values_like(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Random values: from 0.05 to 0.15 for a gain or bias; as for initialisation for a matrix."""
    u = torch.rand(parameter.shape, generator=generator, device="cpu")
    if parameter.ndim < 2:
        return 0.05 + 0.1 * u
    inputs = parameter[0].numel()
    return (2 * u - 1) / inputs**0.5
