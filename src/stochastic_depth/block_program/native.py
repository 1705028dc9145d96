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
class Sum:
    """x = ReLU(BN(y) + shortcut), the output of a stem or branch, which the next branch reads."""

    y: Tensor
    layer: Layer
    """The layer whose convolution y is."""
    shortcut: Tensor | None
    is_written: bool = False
    """Whether x is in memory: the first convolution that reads it writes it."""
    sums: Tensor | None = None
    """In the backward pass, sums of the gradient under the ReLU: float64 [2, channels]."""


class NativeKernels(Kernels):
    """Convolutions on a CPU with normalisation, addition and ReLU fused into them.

    A convolution computes them while it reads its input, and in the backward pass while it reads
    the gradient of its result, so no pass over the images is made for them alone. For the backward
    pass a branch keeps the results of its two convolutions and nothing else. Its output is computed
    and stored by the next branch that reads it. Sums are in float32 and rounded once, so results
    differ from PyTorch's in the last bits. What these kernels are not written for (other strides,
    numbers of channels and types) is computed by PyTorch.

    Raises:
        EngineError: where it cannot be compiled, saying why.
    """

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self._library, self._dtype = library(dtype), dtype
        self._buffers = Buffers()
        self._layers: dict[int, tuple[CLayer, Layer, Tensor]] = {}
        self._sums: dict[Tensor, Sum] = {}
        """The sums whose gradient is not computed yet, by their x."""

    def stem(self, images: Tensor, layer: Layer, out: Tensor) -> tuple[Tensor, ...]:
        self._sums.clear()  # of a step that failed
        if not self._is_stem(images, layer, out):
            return super().stem(images, layer, out)
        y = self._buffers.take(out)
        self._library.convolve_pictures(
            images.data_ptr(), self._layer(layer), y.data_ptr(), *self._geometry(images)
        )
        self._sums[out] = Sum(y, layer, None)
        return (y,)

    def stem_backward(
        self, saved: tuple[Tensor, ...], images: Tensor, layer: Layer, out: Tensor, gradient: Tensor
    ) -> None:
        if not self._is_stem(images, layer, out):
            super().stem_backward(saved, images, layer, out, gradient)
            return
        (y,) = saved
        sums = self._under_relu(out, gradient)
        self._library.convolve_pictures_backward(
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
            return super().branch(self.written(x), first, second, shortcut, out)
        if first.stride > 1:
            self.written(x)
        if self._fits(x, first):
            a = self._convolve(self._input(x), first, x, out)
        else:
            a = self._convolve_by_pytorch(self.written(x), first)
            self._library.observe(a.data_ptr(), self._layer(first), *self._rows(a))
        c = self._convolve(self._between(a, first), second, a, out)
        self._sums[out] = Sum(c, second, shortcut)
        return a, c

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
        if not self._fits(out, second):
            super().branch_backward(saved, x, first, second, out, gradient, of_shortcut)
            return
        a, c = saved
        of_b = self._buffers.take(a)
        sums = self._under_relu(out, gradient)
        sums = self._convolve_backward(
            self._between(a, first), second, c, gradient, sums, None, of_b
        )
        of_x = of_shortcut()
        if self._fits(x, first):
            of_what = self._convolve_backward(self._input(x), first, a, of_b, sums, of_x, of_x)
            if x in self._sums:
                self._sums[x].sums = of_what
            self._buffers.give(a)
        else:  # `a` is PyTorch's
            of_a = torch.empty_like(a)
            self._library.observe_backward(
                a.data_ptr(),
                self._layer(first),
                of_b.data_ptr(),
                sums.data_ptr(),
                of_a.data_ptr(),
                *self._rows(a),
            )
            of_x.add_(self._convolve_by_pytorch_backward(of_a, x, first))
        self._buffers.give(c, of_b)

    def head(self, x: Tensor, layer: Linear, labels: Tensor, gradient: Tensor) -> Tensor:
        if not (_is_image(x, self._dtype) and layer.weight.dtype == torch.float32):
            return super().head(self.written(x), layer, labels, gradient)
        classes = len(layer.bias)
        least, most = (bound.item() for bound in labels.aminmax())
        if least < 0 or most >= classes:
            raise IndexError(f"labels from {least} to {most}: there are {classes} classes")
        loss = torch.empty(())
        self._library.classify(
            self.written(x).data_ptr(),
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

    def written(self, x: Tensor) -> Tensor:
        made = self._sums.get(x)
        if made is not None and not made.is_written:
            self._library.complete(self._input(x), *self._rows(x))
        return x

    def pool_and_pad(self, x: Tensor, out: Tensor) -> None:
        if not _are_pooled(x, out, self._dtype):
            super().pool_and_pad(self.written(x), out)
            return
        self._library.pool(self.written(x).data_ptr(), out.data_ptr(), *_pooled(x, out), _threads())

    def pool_and_pad_backward(self, gradient: Tensor, of_x: Tensor) -> None:
        if not _are_pooled(of_x, gradient, self._dtype):
            super().pool_and_pad_backward(gradient, of_x)
            return
        self._library.pool_backward(
            gradient.data_ptr(), of_x.data_ptr(), *_pooled(of_x, gradient), _threads()
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
        """The convolution y of x, which source describes; its statistics go into the layer."""
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
        of_x: Tensor,
    ) -> Tensor:
        """Both gradients of the convolution y of x, from the gradient of BN(y) and its sums.

        If x is the output of a ReLU, of_x becomes the gradient of that ReLU's input, whose sums are
        returned.
        """
        of_x_sums = _sums(of_x)
        self._library.convolve3x3_backward(
            x,
            self._layer(layer),
            y.data_ptr(),
            gradient.data_ptr(),
            sums.data_ptr(),
            None if added is None else added.data_ptr(),
            of_x.data_ptr(),
            of_x_sums.data_ptr(),
            layer.stride,
            *self._geometry(of_x),
        )
        return of_x_sums

    def _under_relu(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Turn the gradient of x, in place, into that of its ReLU's input; returns the sums."""
        made = self._sums[x]
        if made.sums is None:
            made.sums = _sums(x)
            self._library.complete_backward(
                self._input(x), gradient.data_ptr(), made.sums.data_ptr(), *self._rows(x)
            )
        del self._sums[x]
        return made.sums

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
        """Whether there is a kernel for this convolution of pictures."""
        few, (height, width) = images.shape[1] <= 4, images.shape[2:]
        last = images.is_contiguous(memory_format=torch.channels_last)
        is_like = images.dtype == out.dtype and last and _is_image(out, self._dtype)
        return (
            few
            and is_like
            and layer.stride == 1
            and out.shape[1] == 16
            and height == width
            and self._library.fits_images(width, 16, 1)
        )

    def _input(self, x: Tensor) -> CInput:
        """Arguments that describe x; a kernel that takes them computes x if it is not in memory."""
        made = self._sums.get(x)
        if made is None:
            return CInput(x.data_ptr(), None, None, None)
        made.is_written = True
        shortcut = None if made.shortcut is None else made.shortcut.data_ptr()
        norm = ctypes.pointer(self._layer(made.layer).norm)
        return CInput(x.data_ptr(), made.y.data_ptr(), shortcut, norm)

    def _between(self, y: Tensor, layer: Layer) -> CInput:
        """Arguments that describe ReLU(BN(y)), which is never stored."""
        norm = ctypes.pointer(self._layer(layer).norm)
        return CInput(None, y.data_ptr(), None, norm)

    def _layer(self, layer: Layer) -> CLayer:
        """The arguments of a layer for the C++ kernels."""
        known = self._layers.get(id(layer))
        if known is None:
            seen, noted = c_layer(layer)
            known = self._layers[id(layer)] = seen, layer, noted
        if layer.norm.factor is not None:
            known[0].norm.factor = layer.norm.factor.item()
        return known[0]

    def _geometry(self, x: Tensor) -> tuple[int, int, int, int]:
        """Arguments of a shape: images, side, channels, threads."""
        n, channels, side, _ = x.shape
        return n, side, channels, _threads()

    def _rows(self, x: Tensor) -> tuple[int, int, int]:
        """Arguments of a shape by rows: number of pixels, channels, threads."""
        return x.numel() // x.shape[1], x.shape[1], _threads()


def _threads() -> int:
    return min(torch.get_num_threads(), MOST_THREADS)


def _widened(layer: Layer) -> Layer:
    return replace(layer, weight=layer.weight.float())


def _is_image(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor has this type, is channels_last, and has a multiple of 16 channels."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return x.dtype == dtype and last and x.shape[1] % 16 == 0


def _are_pooled(x: Tensor, out: Tensor, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for pooling x to out."""
    halved = all(
        before == 2 * after for before, after in zip(x.shape[2:], out.shape[2:], strict=True)
    )
    return halved and _is_image(x, dtype) and _is_image(out, dtype)


def _pooled(x: Tensor, out: Tensor) -> tuple[int, int, int, int]:
    """Sizes for pooling: rows of all images, columns of out, channels of both."""
    return len(out) * out.shape[2], out.shape[3], x.shape[1], out.shape[1]


def _sums(x: Tensor) -> Tensor:
    return torch.empty(2, x.shape[1], dtype=torch.float64)
