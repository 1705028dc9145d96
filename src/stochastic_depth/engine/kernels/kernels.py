"""What a set of kernels must offer."""

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


class Kernels(Protocol):
    """Convolutions of 3x3 without bias, padding 1, and batch normalisation with what follows it.

    Images are [batch, channels, height, width], channels_last. Gradients of parameters are written
    where they belong.
    """

    def convolve(self, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        """The convolution of `x`."""
        ...

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
        """The gradient of `x`, if it is needed, added to `add_to` in place if given.

        That of the weight goes to `weight_gradient`.
        """
        ...

    def normalise(
        self, x: Tensor, norm: BatchNorm, shortcut: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """ReLU(BN(x) * factor + shortcut), in `out` if given.

        Notes the statistics of the mini-batch in `norm`, and updates the running ones.
        """
        ...

    def normalise_backward(
        self, gradient: Tensor, out: Tensor, x: Tensor, norm: BatchNorm, has_shortcut: bool
    ) -> Tensor:
        """The gradient of `x`.

        With a shortcut `gradient` itself becomes that of the sum, which is the shortcut's.

        Args:
            gradient: of `out`, the result of `normalise` of `x`.
        """
        ...
