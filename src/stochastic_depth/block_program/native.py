"""The C++ kernels of `cpp/` as `Kernels`, for a CPU, in bfloat16 or float32."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stochastic_depth.block_program.kernels import Kernels, Layer, Linear
from stochastic_depth.block_program.library import (
    MOST_THREADS,
    CInput,
    CLayer,
    c_layer,
    c_linear,
    library,
)
from stochastic_depth.block_program.memory import Buffers


@dataclass
class PendingOutput:
    """The output x = ReLU(BN(y) + shortcut) of a stem or branch, which the next branch computes."""

    y: Tensor
    layer: Layer
    """The layer whose convolution gives y."""
    shortcut: Tensor | None
    is_written: bool = False
    """Whether x is in memory: the first convolution that reads it writes it."""
    grad_sums: Tensor | None = None
    """In the backward pass, sums over the gradient of the ReLU's input: float64 [2, channels]."""


class NativeKernels(Kernels):
    """Convolutions on a CPU with normalisation, addition and ReLU fused into them.

    A convolution computes them while it reads its input, and in the backward pass while it reads
    the gradient of its result, so they need no passes over the images. For the backward pass a
    branch keeps the results of its two convolutions and nothing else. Its output is computed and
    stored by the next branch that reads it. Sums are in float32 and rounded once, so results differ
    from PyTorch's in the last bits. Other strides, numbers of channels and types are left to
    PyTorch.

    Raises:
        EngineError: when the kernels cannot be compiled, with the reason.
    """

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self._library, self._dtype = library(dtype), dtype
        self._buffers = Buffers()
        self._layers: dict[int, tuple[CLayer, Layer, Tensor]] = {}
        self._pending: dict[Tensor, PendingOutput] = {}
        """The outputs whose gradient is not computed yet, by their x."""

    def stem(self, images: Tensor, layer: Layer, out: Tensor) -> tuple[Tensor, ...]:
        self._pending.clear()  # of a step that failed
        if not self._is_stem(images, layer, out):
            return super().stem(images, layer, out)
        y = self._buffers.take(out)
        self._library.convolve_stem(
            images.data_ptr(), self._layer(layer), y.data_ptr(), *self._geometry(images)
        )
        self._pending[out] = PendingOutput(y, layer, None)
        return (y,)

    def stem_backward(
        self, saved: tuple[Tensor, ...], images: Tensor, layer: Layer, out: Tensor, gradient: Tensor
    ) -> None:
        if not self._is_stem(images, layer, out):
            super().stem_backward(saved, images, layer, out, gradient)
            return
        (y,) = saved
        sums = self._relu_backward(out, gradient)
        self._library.convolve_stem_backward(
            images.data_ptr(),
            self._layer(layer),
            y.data_ptr(),
            gradient.data_ptr(),
            sums.data_ptr(),
            *self._geometry(images),
        )
        self._buffers.give(y)

    def branch(
        self, x: Tensor, first: Layer, second: Layer, shortcut: Tensor, out: Tensor
    ) -> tuple[Tensor, ...]:
        if not self._fits(out, second):
            return super().branch(self.materialise(x), first, second, shortcut, out)
        if first.stride > 1:
            self.materialise(x)
        if self._fits(x, first):
            a = self._convolve(self._input(x), first, x, out)
        else:
            a = self._convolve_by_pytorch(self.materialise(x), first)
            self._library.batch_statistics(a.data_ptr(), self._layer(first), *self._rows(a))
        c = self._convolve(self._between(a, first), second, a, out)
        self._pending[out] = PendingOutput(c, second, shortcut)
        return a, c

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
        if not self._fits(out, second):
            super().branch_backward(saved, x, first, second, out, gradient, grad_shortcut)
            return
        a, c = saved
        grad_b = self._buffers.take(a)
        sums = self._relu_backward(out, gradient)
        sums = self._convolve_backward(
            self._between(a, first), second, c, gradient, sums, None, grad_b
        )
        grad_x = grad_shortcut()
        if self._fits(x, first):
            grad_x_sums = self._convolve_backward(
                self._input(x), first, a, grad_b, sums, grad_x, grad_x
            )
            if x in self._pending:
                self._pending[x].grad_sums = grad_x_sums
            self._buffers.give(a)
        else:  # PyTorch allocated `a`
            grad_a = torch.empty_like(a)
            self._library.batch_norm_input_gradient(
                a.data_ptr(),
                self._layer(first),
                grad_b.data_ptr(),
                sums.data_ptr(),
                grad_a.data_ptr(),
                *self._rows(a),
            )
            grad_x.add_(self._convolve_by_pytorch_backward(grad_a, x, first))
        self._buffers.give(c, grad_b)

    def head(self, x: Tensor, layer: Linear, labels: Tensor, gradient: Tensor) -> Tensor:
        if not (_is_image(x, self._dtype) and layer.weight.dtype == torch.float32):
            return super().head(self.materialise(x), layer, labels, gradient)
        classes = len(layer.bias)
        lowest, highest = (bound.item() for bound in labels.aminmax())
        if lowest < 0 or highest >= classes:
            raise IndexError(f"labels from {lowest} to {highest}: there are {classes} classes")
        loss = torch.empty(())
        self._library.classify(
            self.materialise(x).data_ptr(),
            c_linear(layer),
            labels.data_ptr(),
            loss.data_ptr(),
            gradient.data_ptr(),
            len(x),
            x.shape[2] * x.shape[3],
            x.shape[1],
            _threads(),
        )
        return loss

    def materialise(self, x: Tensor) -> Tensor:
        pending = self._pending.get(x)
        if pending is not None and not pending.is_written:
            self._library.batch_norm_relu(self._input(x), *self._rows(x))
        return x

    def pool_and_pad(self, x: Tensor, out: Tensor) -> None:
        if not _are_pooled(x, out, self._dtype):
            super().pool_and_pad(self.materialise(x), out)
            return
        self._library.pool_and_pad(
            self.materialise(x).data_ptr(), out.data_ptr(), *_pooled(x, out), _threads()
        )

    def pool_and_pad_backward(self, gradient: Tensor, grad_x: Tensor) -> None:
        if not _are_pooled(grad_x, gradient, self._dtype):
            super().pool_and_pad_backward(gradient, grad_x)
            return
        self._library.pool_and_pad_backward(
            gradient.data_ptr(), grad_x.data_ptr(), *_pooled(grad_x, gradient), _threads()
        )

    def _convolve_by_pytorch(self, x: Tensor, layer: Layer) -> Tensor:
        """A convolution by PyTorch, in float32 where the processor does not multiply bfloat16.

        PyTorch's convolutions in bfloat16 take four times as long there.
        """
        if self._library.rounds_factors() or x.dtype != torch.bfloat16:
            return self.convolve(x, layer)
        return self.convolve(x.float(), _widened(layer)).to(x.dtype)

    def _convolve_by_pytorch_backward(self, gradient: Tensor, x: Tensor, layer: Layer) -> Tensor:
        if self._library.rounds_factors() or x.dtype != torch.bfloat16:
            return self.convolve_backward(gradient, x, layer)
        return self.convolve_backward(gradient.float(), x.float(), _widened(layer))

    def _convolve(self, source: CInput, layer: Layer, x: Tensor, like: Tensor) -> Tensor:
        """The convolution y of x, which `source` describes; writes the statistics of y."""
        y = self._buffers.take(like)
        self._library.convolve3x3(
            source, self._layer(layer), y.data_ptr(), layer.stride, *self._geometry(x)
        )
        return y

    def _convolve_backward(
        self,
        x: CInput,
        layer: Layer,
        y: Tensor,
        gradient: Tensor,
        sums: Tensor,
        added: Tensor | None,
        grad_x: Tensor,
    ) -> Tensor:
        """Both gradients of the convolution y of x, from the gradient of BN(y) and its sums.

        If x is the output of a ReLU, grad_x becomes the gradient of that ReLU's input; returns the
        sums over it.
        """
        grad_x_sums = _empty_sums(grad_x)
        self._library.convolve3x3_backward(
            x,
            self._layer(layer),
            y.data_ptr(),
            gradient.data_ptr(),
            sums.data_ptr(),
            None if added is None else added.data_ptr(),
            grad_x.data_ptr(),
            grad_x_sums.data_ptr(),
            layer.stride,
            *self._geometry(grad_x),
        )
        return grad_x_sums

    def _relu_backward(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Mask the gradient of x by its ReLU, in place; returns the sums over the result."""
        pending = self._pending[x]
        if pending.grad_sums is None:
            pending.grad_sums = _empty_sums(x)
            self._library.relu_backward(
                self._input(x), gradient.data_ptr(), pending.grad_sums.data_ptr(), *self._rows(x)
            )
        del self._pending[x]
        return pending.grad_sums

    def _fits(self, x: Tensor, layer: Layer) -> bool:
        """Whether there is a kernel for this convolution of x."""
        (out, into), (height, width) = layer.weight.shape[:2], x.shape[2:]
        return (
            _is_image(x, self._dtype)
            and x.shape[1] == into
            and out == layer.stride * into
            and height == width
            and self._library.fits_images(width, into, layer.stride)
        )

    def _is_stem(self, images: Tensor, layer: Layer, out: Tensor) -> bool:
        """Whether there is a kernel for this stem."""
        height, width = images.shape[2:]
        return (
            _is_image(out, self._dtype)
            and images.dtype == out.dtype
            and images.is_contiguous(memory_format=torch.channels_last)
            and images.shape[1] <= 4
            and layer.stride == 1
            and out.shape[1] == 16
            and height == width
            and self._library.fits_images(width, 16, 1)
        )

    def _input(self, x: Tensor) -> CInput:
        """Describe x to a kernel, which computes and stores x if it is pending."""
        pending = self._pending.get(x)
        if pending is None:
            return CInput(x.data_ptr(), None, None, None)
        pending.is_written = True
        shortcut = None if pending.shortcut is None else pending.shortcut.data_ptr()
        norm = ctypes.pointer(self._layer(pending.layer).norm)
        return CInput(x.data_ptr(), pending.y.data_ptr(), shortcut, norm)

    def _between(self, y: Tensor, layer: Layer) -> CInput:
        """Describe ReLU(BN(y)) to a kernel, which computes it and never stores it."""
        norm = ctypes.pointer(self._layer(layer).norm)
        return CInput(None, y.data_ptr(), None, norm)

    def _layer(self, layer: Layer) -> CLayer:
        """The layer as a C structure, with its current factor."""
        known = self._layers.get(id(layer))
        if known is None:
            structure, statistics = c_layer(layer)
            known = self._layers[id(layer)] = structure, layer, statistics
        if layer.norm.factor is not None:
            known[0].norm.factor = layer.norm.factor.item()
        return known[0]

    def _geometry(self, x: Tensor) -> tuple[int, int, int, int]:
        """The shape of x for a kernel: images, side, channels; and the threads."""
        n, channels, side, _ = x.shape
        return n, side, channels, _threads()

    def _rows(self, x: Tensor) -> tuple[int, int, int]:
        """The shape of x for a kernel that runs over pixels: pixels, channels; and the threads."""
        return x.numel() // x.shape[1], x.shape[1], _threads()


def _threads() -> int:
    return min(torch.get_num_threads(), MOST_THREADS)


def _widened(layer: Layer) -> Layer:
    return replace(layer, weight=layer.weight.float())


def _is_image(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor has this type, is channels_last, and has a multiple of 16 channels."""
    is_channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return x.dtype == dtype and is_channels_last and x.shape[1] % 16 == 0


def _are_pooled(x: Tensor, out: Tensor, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for pooling x to out."""
    halved = x.shape[2:] == (2 * out.shape[2], 2 * out.shape[3])
    return halved and _is_image(x, dtype) and _is_image(out, dtype)


def _pooled(x: Tensor, out: Tensor) -> tuple[int, int, int, int]:
    """Sizes for pooling: rows of all images, columns of out, channels of both."""
    return len(out) * out.shape[2], out.shape[3], x.shape[1], out.shape[1]


def _empty_sums(x: Tensor) -> Tensor:
    """Memory for two sums for each channel of x."""
    return torch.empty(2, x.shape[1], dtype=torch.float64)
