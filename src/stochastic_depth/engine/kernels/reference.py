"""PyTorch's own operators, one after the other: on every device, in every precision."""

import torch
from torch import Tensor

from stochastic_depth.engine.kernels.kernels import BatchNorm

aten = torch.ops.aten


class ReferenceKernels:
    """The same operators as autograd calls, so that the results are the same."""

    def convolve(self, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        return torch.conv2d(x, weight, None, stride, 1)

    def convolve_backward(
        self,
        gradient: Tensor,
        x: Tensor,
        weight: Tensor,
        stride: int,
        weight_gradient: Tensor,
        add_to: Tensor | None = None,
        needs_input: bool = True,
    ) -> Tensor | None:
        geometry = [stride, stride], [1, 1], [1, 1], False, [0, 0], 1
        asked = [needs_input, True, False]
        of_input, of_weight, _ = aten.convolution_backward(
            gradient, x, weight, None, *geometry, asked
        )
        weight_gradient.copy_(of_weight)
        return of_input if add_to is None else add_to.add_(of_input)

    def normalise(
        self, x: Tensor, norm: BatchNorm, shortcut: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        y, norm.mean, norm.rstd = aten.native_batch_norm(
            x,
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            True,
            norm.momentum,
            norm.eps,
        )
        if norm.factor is not None:
            y *= norm.factor
        if shortcut is not None:
            y = torch.add(shortcut, y, out=out)
        elif out is not None:
            y = out.copy_(y)
        return torch.relu_(y)

    def normalise_backward(
        self, gradient: Tensor, out: Tensor, x: Tensor, norm: BatchNorm, has_shortcut: bool
    ) -> Tensor:
        if has_shortcut:
            aten.threshold_backward.grad_input(gradient, out, 0, grad_input=gradient)
        else:
            gradient = aten.threshold_backward(gradient, out, 0)
        of_x, of_weight, of_bias = aten.native_batch_norm_backward(
            gradient if norm.factor is None else gradient * norm.factor,
            x,
            norm.weight,
            None,
            None,
            norm.mean,
            norm.rstd,
            True,
            norm.eps,
            [True, True, True],
        )
        norm.weight_gradient.copy_(of_weight)
        norm.bias_gradient.copy_(of_bias)
        return of_x
