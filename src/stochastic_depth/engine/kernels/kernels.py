"""What a set of kernels must offer: the arithmetic of a residual network's pieces."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


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
    """[]: what the output is multiplied by, if by anything."""
    mean: Tensor | None = None
    rstd: Tensor | None = None


@dataclass
class Layer:
    """A convolution of 3x3 without bias, padding 1, and its batch normalisation."""

    weight: Tensor
    """In the type that is computed with, channels_last."""
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


class Kernels(Protocol):
    """Images are [batch, channels, height, width], channels_last.

    Statistics of a mini-batch are noted in the layers' norms and added to the running ones.
    Gradients of parameters are written where they belong.
    """

    def stem(self, images: Tensor, layer: Layer, out: Tensor) -> tuple[Tensor, ...]:
        """out = ReLU(BN(conv(images))); gives what the backward pass needs."""
        ...

    def stem_backward(
        self, saved: tuple[Tensor, ...], images: Tensor, layer: Layer, out: Tensor, gradient: Tensor
    ) -> None:
        """Gradients of the stem's parameters from that of `out`."""
        ...

    def branch(
        self, x: Tensor, first: Layer, second: Layer, shortcut: Tensor, out: Tensor
    ) -> tuple[Tensor, ...]:
        """out = ReLU(shortcut + factor * BN(conv(ReLU(BN(conv(x)))))).

        Gives what the backward pass needs, besides x and out.
        """
        ...

    def head(self, x: Tensor, layer: Linear, labels: Tensor, gradient: Tensor) -> Tensor:
        """The cross entropy, [], of what `layer` makes of the mean over x's pixels; all gradients.

        Args:
            labels: int64 [batch].
            gradient: becomes that of x.
        """
        ...

    def written(self, x: Tensor) -> Tensor:
        """x, for others to read: what `stem` and `branch` give may be put off until it is read."""
        ...

    def pool_and_pad(self, x: Tensor, out: Tensor) -> None:
        """out = means over 2x2 of x, and zeros in the channels that it has more."""
        ...

    def pool_and_pad_backward(self, gradient: Tensor, of_x: Tensor) -> None:
        """The gradient of x from that of `out`."""
        ...

    def branch_backward(
        self,
        saved: tuple[Tensor, ...],
        x: Tensor,
        first: Layer,
        second: Layer,
        out: Tensor,
        gradient: Tensor,
        of_shortcut: Callable[[], Tensor],
    ) -> None:
        """Gradients of the parameters, and of x; where x is 0, its gradient may be left out.

        Args:
            gradient: of `out`; becomes that of the sum under the ReLU, in place.
            of_shortcut: called after that, it gives the gradient of x that comes by the shortcut,
                to which the branch's is added in place.
        """
        ...
