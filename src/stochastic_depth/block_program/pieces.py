"""The pieces of a training step (stem, residual block, head) and how they are repeated.

A `Replay` turns a piece into something that repeats it: the piece itself, or a CUDA graph.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from stochastic_depth.block_program.kernels import BatchNorm, Kernels, Layer, Linear
from stochastic_depth.block_program.memory import FlatParameters


def layer_of(conv: nn.Conv2d, norm: nn.BatchNorm2d, flat: FlatParameters) -> Layer:
    """The tensors of a convolution and its batch normalisation, for the kernels."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.momentum is not None
    return Layer(
        flat.view(conv.weight, flat.working),
        flat.view(conv.weight, flat.gradients),
        conv.stride[0],
        BatchNorm(
            norm.weight.detach(),
            norm.bias.detach(),
            flat.view(norm.weight, flat.gradients),
            flat.view(norm.bias, flat.gradients),
            norm.running_mean,
            norm.running_var,
            norm.momentum,
            norm.eps,
        ),
    )


def linear_of(module: nn.Linear, flat: FlatParameters) -> Linear:
    """The tensors of the last layer, for the kernels."""
    return Linear(
        module.weight.detach(),
        module.bias.detach(),
        flat.view(module.weight, flat.gradients),
        flat.view(module.bias, flat.gradients),
    )


class Stem:
    """The first convolution: images -> x."""

    def __init__(
        self, layer: Layer, images: Tensor, x: Tensor, gradient: Tensor, kernels: Kernels
    ) -> None:
        self.layer, self.images, self.x, self.gradient = layer, images, x, gradient
        self.kernels = kernels
        self.saved: tuple[Tensor, ...] = ()

    def forward(self) -> None:
        self.saved = self.kernels.stem(self.images, self.layer, self.x)

    def backward(self) -> None:
        self.kernels.stem_backward(self.saved, self.images, self.layer, self.x, self.gradient)


class BlockPiece:
    """A residual block: x -> ReLU(shortcut(x) + branch(x)).

    The branch has two layers; the shortcut is the identity, or pooling and padding.

    Args:
        gradient: where the backward pass writes the gradient of x.
        gradient_out: where the backward pass finds the gradient of `out`.
        is_fixed: whether `saved` stays after the backward pass, because the replay is fixed.
    """

    def __init__(
        self,
        first: Layer,
        second: Layer,
        x: Tensor,
        out: Tensor,
        gradient: Tensor,
        gradient_out: Tensor,
        kernels: Kernels,
        is_fixed: bool,
    ) -> None:
        self.layers = first, second
        self.x, self.out = x, out
        self.gradient, self.gradient_out = gradient, gradient_out
        self.is_transition = x.shape != out.shape
        self._pooled = torch.empty_like(out) if self.is_transition else out
        self.kernels, self._is_fixed = kernels, is_fixed
        self.saved: tuple[Tensor, ...] = ()
        self.branch_bytes = 0
        """Bytes that the branch saves for its backward pass, besides x and out."""

    def forward(self) -> None:
        shortcut = self.x
        if self.is_transition:
            shortcut = self._pooled
            self.kernels.pool_and_pad(self.x, shortcut)
        self.saved = self.kernels.branch(self.x, *self.layers, shortcut, self.out)
        self.branch_bytes = self.branch_bytes or sum(tensor.nbytes for tensor in self.saved)

    def backward(self) -> None:
        self.kernels.branch_backward(
            self.saved, self.x, *self.layers, self.out, self.gradient_out, self._grad_shortcut
        )
        if not self._is_fixed:
            self.saved = ()

    def skip_forward(self) -> None:
        """The shortcut of a transition. Its ReLU is the identity, because x comes from a ReLU."""
        self.kernels.pool_and_pad(self.x, self.out)

    def skip_backward(self) -> None:
        """The backward pass of a transition's shortcut: through average pooling and padding."""
        self._grad_shortcut()

    def _grad_shortcut(self) -> Tensor:
        if self.is_transition:
            self.kernels.pool_and_pad_backward(self.gradient_out, self.gradient)
        return self.gradient


class Head:
    """The last layer: x -> loss."""

    def __init__(
        self, layer: Linear, labels: Tensor, x: Tensor, gradient: Tensor, kernels: Kernels
    ) -> None:
        self.layer, self.labels, self.x, self.gradient = layer, labels, x, gradient
        self.kernels = kernels
        self.loss = torch.zeros_like(layer.bias[0])

    def forward_and_backward(self) -> None:
        self.loss.copy_(self.kernels.head(self.x, self.layer, self.labels, self.gradient))


Work = Callable[[], None]


class Replay(Protocol):
    """Turns work on static buffers into a callable that repeats it."""

    is_fixed: bool
    """Whether the work is repeated on the addresses with which it was first done, so that the
    memory that it allocates stays reserved for it."""

    def warm_up(self, work: Work) -> None:
        """Do all the work once, if that is needed before it can be captured."""
        ...

    def __call__(self, work: Work) -> Work: ...


class Eagerly:
    """Calls the work itself, without capturing it."""

    is_fixed = False

    def warm_up(self, work: Work) -> None:
        pass

    def __call__(self, work: Work) -> Work:
        return work


WARM_UP_ROUNDS = 3
"""How often all work is done before it is captured."""


class CudaGraphs:
    """One CUDA graph for each piece of work, all in one pool of memory.

    A piece may reuse memory of earlier pieces that nothing refers to any more; what a forward piece
    saves stays until its backward piece. Pieces must be captured in the order in which they will
    run, and any of them may be left out of a step.
    """

    is_fixed = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Work) -> None:
        """Let libraries choose algorithms and compilers compile before anything is captured."""
        current = torch.cuda.current_stream(self._device)
        aside = torch.cuda.Stream(self._device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP_ROUNDS):
                work()
        current.wait_stream(aside)

    def __call__(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool):
            work()
        return graph.replay
