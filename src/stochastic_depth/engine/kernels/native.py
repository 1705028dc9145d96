"""The kernels in `avx512/`: bfloat16 on processors that multiply it."""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from stochastic_depth.engine.buffers import Buffers
from stochastic_depth.engine.kernels.kernels import BatchNorm, Layer
from stochastic_depth.engine.kernels.library import library
from stochastic_depth.engine.kernels.reference import ReferenceKernels


class NativeKernels(ReferenceKernels):
    """bfloat16 on a CPU: convolutions close to the processor's peak, which compute on the way what
    normalisation and ReLU make of their input, so that it is neither stored nor read again.

    A branch keeps the results of its two convolutions, nothing else. Sums are in float32 and
    rounded once, so results differ from the reference's in the last bits of bfloat16. What is not
    of a form for it (strides, other numbers of channels, other types) the reference computes.

    Raises:
        EngineError: where it cannot be compiled, saying why.
    """

    def __init__(self) -> None:
        self._library = library()
        self._threads = torch.get_num_threads()
        self._buffers = Buffers()

    def stem(self, images: Tensor, layer: Layer, out: Tensor) -> tuple[Tensor, ...]:
        a = self.convolve(images, layer)
        if not _is_image(a):
            return super().stem(images, layer, out)
        self._activate(a, self._normalise(a, self._moments(a), layer.norm), None, out)
        return (a,)

    def stem_backward(
        self, saved: tuple[Tensor, ...], images: Tensor, layer: Layer, out: Tensor, gradient: Tensor
    ) -> None:
        (a,) = saved
        if not _is_image(a):
            super().stem_backward(saved, images, layer, out, gradient)
            return
        sums = self._activate_backward(gradient, out, a, layer.norm)
        by = self._normalise_backward(a, sums, layer.norm)
        self.convolve_backward(self._spread(gradient, a, by), images, layer, needs_input=False)

    def branch(
        self, x: Tensor, first: Layer, second: Layer, shortcut: Tensor, out: Tensor
    ) -> tuple[Tensor, ...]:
        if not _fits(out, second):
            return super().branch(x, first, second, shortcut, out)
        if _fits(x, first):
            a, sums = self._convolve(x, first)
        else:
            a = self.convolve(x, first)
            sums = self._moments(a)
        affine = self._normalise(a, sums, first.norm)
        c, sums = self._convolve(a, second, affine)
        self._activate(c, self._normalise(c, sums, second.norm), shortcut, out)
        return a, c, affine

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
        if not _fits(out, second):
            super().branch_backward(saved, x, first, second, out, gradient, of_shortcut)
            return
        a, c, affine = saved
        of_b = self._buffers.take(a)
        sums = self._activate_backward(gradient, out, c, second.norm)
        by = self._normalise_backward(c, sums, second.norm)
        sums = self._convolve_backward(
            a, second, gradient, c, by, of_b, affine=affine, mean=first.norm.mean
        )
        by = self._normalise_backward(a, sums, first.norm)
        of_x = of_shortcut()
        if _fits(x, first):
            self._convolve_backward(x, first, of_b, a, by, of_x, y_affine=affine, added=of_x)
            self._buffers.give(a)
        else:  # `a` is PyTorch's
            of_x.add_(self.convolve_backward(self._spread(of_b, a, by, affine), x, first))
        self._buffers.give(c, of_b)

    def _convolve(
        self, x: Tensor, layer: Layer, affine: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The convolution of x, or of ReLU(x * scale + shift), and the sums of it."""
        out, sums = self._buffers.take(x), _sums(x)
        n, channels, side, _ = x.shape
        self._library.convolve3x3(
            _at(x),
            *_two(affine),
            _at(layer.weight),
            _at(out),
            _at(sums),
            n,
            side,
            channels,
            self._threads,
        )
        return out, sums

    def _convolve_backward(
        self,
        x: Tensor,
        layer: Layer,
        gradient: Tensor,
        y: Tensor,
        by: Tensor,
        of_x: Tensor,
        affine: Tensor | None = None,
        mean: Tensor | None = None,
        y_affine: Tensor | None = None,
        added: Tensor | None = None,
    ) -> Tensor:
        """Both gradients of the convolution y of x, from that of y's normalisation.

        If x has been through normalisation and ReLU too, gives the sums of the gradient of that.
        """
        n, channels, side, _ = x.shape
        sums = _sums(x)
        self._library.convolve3x3_backward(
            _at(x),
            *_two(affine),
            _at(mean),
            _at(gradient),
            _at(y),
            _at(by),
            *_two(y_affine),
            _at(layer.weight),
            _at(layer.weight_gradient),
            _at(added),
            _at(of_x),
            _at(sums),
            n,
            side,
            channels,
            self._threads,
        )
        return sums

    def _moments(self, x: Tensor) -> Tensor:
        """Sums of x and of its squares, [2, channels]."""
        sums = _sums(x)
        self._library.sum_moments(_at(x), _at(sums), *_rows(x), self._threads)
        return sums

    def _normalise(self, x: Tensor, sums: Tensor, norm: BatchNorm) -> Tensor:
        """Note the statistics of x; gives scale and shift, float32 [2, channels]."""
        channels = x.shape[1]
        norm.mean, norm.rstd = torch.empty(2, channels).unbind()
        affine = torch.empty(2, channels)
        self._library.normalise(
            _at(sums),
            _at(norm.weight),
            _at(norm.bias),
            _at(norm.running_mean),
            _at(norm.running_var),
            _at(norm.mean),
            _at(norm.rstd),
            *_two(affine),
            ctypes.c_float(norm.momentum),
            ctypes.c_float(norm.eps),
            _factor(norm),
            *_rows(x),
        )
        return affine

    def _activate_backward(
        self, gradient: Tensor, out: Tensor, x: Tensor, norm: BatchNorm
    ) -> Tensor:
        """`gradient` of `out` becomes that of what is under the ReLU; gives the sums of it."""
        sums = _sums(x)
        self._library.activate_backward(
            _at(gradient), _at(out), _at(x), _at(norm.mean), _at(sums), *_rows(x), self._threads
        )
        return sums

    def _normalise_backward(self, x: Tensor, sums: Tensor, norm: BatchNorm) -> Tensor:
        """Gradients of weight and bias; gives the coefficients of that of x, [3, channels]."""
        by = torch.empty(3, x.shape[1])
        self._library.normalise_backward(
            _at(sums),
            _at(norm.weight),
            _at(norm.mean),
            _at(norm.rstd),
            _at(norm.weight_gradient),
            _at(norm.bias_gradient),
            _at(by),
            _factor(norm),
            *_rows(x),
        )
        return by

    def _activate(self, x: Tensor, affine: Tensor, shortcut: Tensor | None, out: Tensor) -> None:
        """out = ReLU(x * scale + shift + shortcut)."""
        self._library.activate(
            _at(x), *_two(affine), _at(shortcut), _at(out), *_rows(x), self._threads
        )

    def _spread(
        self, gradient: Tensor, x: Tensor, by: Tensor, affine: Tensor | None = None
    ) -> Tensor:
        """The gradient of x, after `_normalise_backward`."""
        of_x = torch.empty_like(x)
        self._library.spread(
            _at(gradient), _at(x), _at(by), *_two(affine), _at(of_x), *_rows(x), self._threads
        )
        return of_x


def _is_image(x: Tensor) -> bool:
    """Whether it is bfloat16, channels_last, in sixteens of channels."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return x.dtype == torch.bfloat16 and last and x.shape[1] % 16 == 0


def _fits(x: Tensor, layer: Layer) -> bool:
    """Whether there is a kernel for this convolution of x."""
    (out, into), (height, width) = layer.weight.shape[:2], x.shape[2:]
    return (
        _is_image(x)
        and layer.stride == 1
        and x.shape[1] == out == into
        and out in (16, 32, 64)
        and height == width
        and width % (16 if out == 16 else 8) == 0
    )


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _two(pair: Tensor | None) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    """The rows of [2, channels], or nothing."""
    return (_at(None), _at(None)) if pair is None else (_at(pair[0]), _at(pair[1]))


def _rows(x: Tensor) -> tuple[ctypes.c_long, int]:
    """Number of pixels, channels."""
    return ctypes.c_long(x.numel() // x.shape[1]), x.shape[1]


def _sums(x: Tensor) -> Tensor:
    return torch.empty(2, x.shape[1], dtype=torch.float64)


def _factor(norm: BatchNorm) -> ctypes.c_float:
    return ctypes.c_float(1.0 if norm.factor is None else norm.factor.item())
