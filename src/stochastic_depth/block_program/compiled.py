"""Normalisation with the ReLU and the addition that follow it, fused by PyTorch's compiler."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from stochastic_depth.block_program.kernels import BatchNorm, Kernels

PIXELS = (0, 2, 3)


def _wide(x: Tensor) -> Tensor:
    """Convert x to the precision of sums: float32, or float64 if x has it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _per_channel(v: Tensor) -> Tensor:
    return v[:, None, None]


def statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and reciprocal deviation of each channel of a mini-batch, [channels]."""
    variance, mean = torch.var_mean(_wide(x), PIXELS, correction=0)
    return mean, variance, torch.rsqrt(variance + eps)


def activate(x: Tensor, scale: Tensor, shift: Tensor, shortcut: Tensor | None, out: Tensor) -> None:
    """out = ReLU(x * scale + shift + shortcut)."""
    y = _wide(x) * _per_channel(scale) + _per_channel(shift)
    out.copy_(torch.relu(y if shortcut is None else y + shortcut))


def parameter_gradients(
    gradient: Tensor, out: Tensor, x: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of bias and gain; masks `gradient` by the ReLU, in place."""
    masked = torch.where(out > 0, gradient, 0)
    gradient.copy_(masked)
    d = _wide(masked)
    centred = (_wide(x) - _per_channel(mean)) * _per_channel(rstd)
    return d.sum(PIXELS), (d * centred).sum(PIXELS)


def input_gradient(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    grad_bias: Tensor,
    grad_weight: Tensor,
) -> Tensor:
    """The gradient of x."""
    count = x.numel() // x.shape[1]
    centred = (_wide(x) - _per_channel(mean)) * _per_channel(rstd)
    through_statistics = _per_channel(grad_bias) + centred * _per_channel(grad_weight)
    grad_x = (_wide(gradient) - through_statistics / count) * _per_channel(scale)
    return grad_x.to(x.dtype)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile with one graph for each shape; a network has six."""
    return torch.compile(function, fullgraph=True, dynamic=False)


class CompiledKernels(Kernels):
    """Convolutions by PyTorch's operators, and compiled kernels between them.

    Everything between two convolutions is one compiled kernel, or two if a reduction comes first:
    in Triton on a GPU, in C++ on a CPU. Sums are rounded once, so results differ from the
    reference's in the last bits.
    """

    def normalise(
        self, x: Tensor, norm: BatchNorm, shortcut: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        mean, variance, rstd = _compiled(statistics)(x, norm.eps)
        count = x.numel() // x.shape[1]
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)
        norm.mean, norm.rstd = mean, rstd
        scale = norm.weight * rstd
        shift = norm.bias - scale * mean
        if norm.factor is not None:
            scale, shift = scale * norm.factor, shift * norm.factor
        out = torch.empty_like(x) if out is None else out
        _compiled(activate)(x, scale, shift, shortcut, out)
        return out

    def normalise_backward(
        self, gradient: Tensor, out: Tensor, x: Tensor, norm: BatchNorm
    ) -> Tensor:
        assert norm.mean is not None
        assert norm.rstd is not None
        statistics = norm.mean, norm.rstd
        sums = _compiled(parameter_gradients)(gradient, out, x, *statistics)
        grad_bias, grad_weight = sums
        scale = norm.weight * norm.rstd
        if norm.factor is not None:
            scale = scale * norm.factor
            grad_bias, grad_weight = grad_bias * norm.factor, grad_weight * norm.factor
        norm.bias_gradient.copy_(grad_bias)
        norm.weight_gradient.copy_(grad_weight)
        return _compiled(input_gradient)(gradient, x, *statistics, scale, *sums)
