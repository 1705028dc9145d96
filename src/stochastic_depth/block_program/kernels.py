"""The arithmetic of a residual network, by PyTorch's operators; other kernels override it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


@dataclass
class BatchNorm:
    """The tensors of one batch normalisation, each [channels]; `mean` and `rstd` from forward."""

    weight: Tensor
    bias: Tensor
    weight_gradient: Tensor
    bias_gradient: Tensor
    running_mean: Tensor
    running_var: Tensor
    momentum: float
    eps: float
    factor: Tensor | None = None
    """[]: the output is multiplied by it; None for 1."""
    mean: Tensor | None = None
    rstd: Tensor | None = None


@dataclass
class Layer:
    """A 3x3 convolution with padding 1 and without bias, and its batch normalisation."""

    weight: Tensor
    """In the type of the computation, channels_last."""
    weight_gradient: Tensor
    stride: int
    norm: BatchNorm


@dataclass
class Linear:
    """The last layer: weight [classes, channels], bias [classes]."""

    weight: Tensor
    bias: Tensor
    weight_gradient: Tensor
    bias_gradient: Tensor


class Kernels:
    """Computes with the operators of PyTorch that autograd calls, so results are identical, except
    that the last layer is in float32 where autocast has it in bfloat16.

    Other kernels are subclasses that override some of the methods. Images are [batch, channels,
    height, width], channels_last. `grad_x` is the gradient of the loss with respect to `x`. A
    forward method stores the statistics of the mini-batch in the layer's `norm` and updates the
    running ones. A backward method writes the gradients of the parameters to the layer.
    """

    def stem(self, images: Tensor, layer: Layer, out: Tensor) -> tuple[Tensor, ...]:
        """out = ReLU(BN(conv(images))); returns what the backward pass needs."""
        a = self.convolve(images, layer)
        self.normalise(a, layer.norm, out=out)
        return (a,)

    def stem_backward(
        self, saved: tuple[Tensor, ...], images: Tensor, layer: Layer, out: Tensor, gradient: Tensor
    ) -> None:
        """Compute the gradients of the stem's parameters from the gradient of `out`."""
        (a,) = saved
        grad_a = self.normalise_backward(gradient, out, a, layer.norm)
        self.convolve_backward(grad_a, images, layer, needs_input=False)

    def branch(
        self, x: Tensor, first: Layer, second: Layer, shortcut: Tensor, out: Tensor
    ) -> tuple[Tensor, ...]:
        """out = ReLU(shortcut + factor * BN(conv(ReLU(BN(conv(x)))))).

        Returns what the backward pass needs besides x and out.
        """
        a = self.convolve(x, first)
        b = self.normalise(a, first.norm)
        c = self.convolve(b, second)
        self.normalise(c, second.norm, shortcut, out)
        return a, b, c

    def branch_backward(
        self,
        saved: tuple[Tensor, ...],
        x: Tensor,
        first: Layer,
        second: Layer,
        out: Tensor,
        gradient: Tensor,
        grad_shortcut: Callable[[], Tensor],
    ) -> None:
        """Compute the gradients of the parameters and of x; where x is 0, that of x may be 0.

        Args:
            gradient: the gradient of `out`. It is changed, in place, into the gradient of the sum
                to which the ReLU is applied.
            grad_shortcut: returns the gradient of x through the shortcut, to which the gradient
                through the branch is added in place. It is called after `gradient` was changed.
        """
        a, b, c = saved
        grad_c = self.normalise_backward(gradient, out, c, second.norm)
        grad_b = self.convolve_backward(grad_c, b, second)
        grad_a = self.normalise_backward(grad_b, b, a, first.norm)
        grad_shortcut().add_(self.convolve_backward(grad_a, x, first))

    def head(self, x: Tensor, layer: Linear, labels: Tensor, gradient: Tensor) -> Tensor:
        """The cross-entropy, [], of `layer` on the mean over the pixels of x; writes all gradients.

        Args:
            labels: int64 [batch].
            gradient: the gradient of x is written here.
        """
        pixels = x.shape[2] * x.shape[3]
        pooled = x.mean((2, 3)).to(layer.weight.dtype)
        log_p = torch.log_softmax(torch.addmm(layer.bias, pooled, layer.weight.T), 1)
        loss = F.nll_loss(log_p, labels)
        grad_scores = log_p.exp_().sub_(F.one_hot(labels, len(layer.bias))).div_(len(labels))
        torch.mm(grad_scores.T, pooled, out=layer.weight_gradient)
        torch.sum(grad_scores, 0, out=layer.bias_gradient)
        gradient.copy_((grad_scores @ layer.weight).div_(pixels)[:, :, None, None])
        return loss

    def materialise(self, x: Tensor) -> Tensor:
        """Return x, after writing it to memory if `stem` or `branch` has postponed that."""
        return x

    def pool_and_pad(self, x: Tensor, out: Tensor) -> None:
        """out = the means over 2x2 pixels of x, with channels of zeros appended."""
        added = out.shape[1] - x.shape[1]
        out.copy_(F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 0, added)))

    def pool_and_pad_backward(self, gradient: Tensor, grad_x: Tensor) -> None:
        """Write the gradient of x, computed from the gradient of `out`."""
        nearest = F.interpolate(gradient[:, : grad_x.shape[1]], scale_factor=2, mode="nearest")
        torch.mul(nearest, 0.25, out=grad_x)

    def convolve(self, x: Tensor, layer: Layer) -> Tensor:
        """The convolution of `x`."""
        return torch.conv2d(x, layer.weight, None, layer.stride, 1)

    def convolve_backward(
        self, gradient: Tensor, x: Tensor, layer: Layer, needs_input: bool = True
    ) -> Tensor:
        """Return the gradient of `x`, if it is needed; write the gradient of the weight."""
        options = [layer.stride] * 2, [1, 1], [1, 1], False, [0, 0], 1
        grad_input, grad_weight, _ = aten.convolution_backward(
            gradient, x, layer.weight, None, *options, [needs_input, True, False]
        )
        layer.weight_gradient.copy_(grad_weight)
        return grad_input

    def normalise(
        self, x: Tensor, norm: BatchNorm, shortcut: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """ReLU(BN(x) * factor + shortcut), in `out` if given."""
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
        self, gradient: Tensor, out: Tensor, x: Tensor, norm: BatchNorm
    ) -> Tensor:
        """Return the gradient of `x`, from the gradient of `out`.

        `gradient` is masked by the ReLU, in place.
        """
        aten.threshold_backward.grad_input(gradient, out, 0, grad_input=gradient)
        grad_x, grad_weight, grad_bias = aten.native_batch_norm_backward(
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
        norm.weight_gradient.copy_(grad_weight)
        norm.bias_gradient.copy_(grad_bias)
        return grad_x
