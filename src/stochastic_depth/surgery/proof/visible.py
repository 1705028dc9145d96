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

from stochastic_depth.surgery.example import has_content, preserve_state
from stochastic_depth.surgery.proof.calls import counted_calls
from stochastic_depth.tensors import tensors_in

_VANISHING = 1e-3
"""Parameters are replaced if none of their values is larger than this."""


@contextmanager
def visible_branches(model: nn.Module, run: Callable[..., Any]) -> Iterator[None]:
    """While entered, trainable parameters that are zero or nearly zero have random values.

    The values are the same each time. If the model cannot run with them, or takes another path,
    nothing is replaced.

    Args:
        run: calls the model on the example.
    """
    vanishing = [p for p in model.parameters() if p.requires_grad and _vanishes(p)]
    usual = _calls(model, run) if vanishing else None
    before = [parameter.detach().clone() for parameter in vanishing]
    generator = torch.Generator("cpu").manual_seed(0)
    for parameter in vanishing:
        parameter.data.copy_(_values_like(parameter, generator))
    if usual is not None and _calls(model, run) != usual:
        _restore(vanishing, before)
        vanishing = []
    try:
        yield
    finally:
        _restore(vanishing, before)


def _vanishes(parameter: Tensor) -> bool:
    plain = has_content(parameter) and parameter.is_floating_point() and parameter.numel() > 0
    return plain and parameter.detach().abs().max().item() <= _VANISHING


def _values_like(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Random values: from 0.05 to 0.15 for a gain or bias; as for initialisation for a matrix."""
    u = torch.rand(parameter.shape, generator=generator, device="cpu")
    if parameter.ndim < 2:
        return 0.05 + 0.1 * u
    inputs = parameter[0].numel()
    return (2 * u - 1) / inputs**0.5


def _restore(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=False):
        parameter.data.copy_(value)


def _calls(model: nn.Module, run: Callable[..., Any]) -> Counter[str] | None:
    """How often each module is called in evaluation mode; None if an output is not finite."""
    with preserve_state(model), torch.no_grad():
        model.eval()
        try:
            with counted_calls(model) as calls:
                outputs = tensors_in(run())
            dense = [out for out in outputs if out.layout == torch.strided]
            return calls.number if all(bool(out.isfinite().all()) for out in dense) else None
        except Exception:
            return None
