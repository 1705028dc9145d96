"""What crosses the border to `avx512/kernels.cpp`: its structures, and what its functions take."""

import ctypes
from ctypes import POINTER, c_float, c_int, c_long, c_void_p

import torch
from torch import Tensor

from stochastic_depth.engine.kernels import kernels


class Norm(ctypes.Structure):
    """See `normalisation.h`."""

    _fields_ = [
        *((name, c_void_p) for name in ("weight", "bias", "of_weight", "of_bias")),
        *((name, c_void_p) for name in ("running_mean", "running_var")),
        *((name, c_void_p) for name in ("mean", "rstd", "scale", "shift")),
        *((name, c_float) for name in ("momentum", "eps", "factor")),
    ]


class Layer(ctypes.Structure):
    _fields_ = [("weight", c_void_p), ("of_weight", c_void_p), ("norm", Norm)]


class Input(ctypes.Structure):
    """What is convolved: x, which may be made of others on the way."""

    _fields_ = [("x", c_void_p), ("y", c_void_p), ("shortcut", c_void_p), ("norm", POINTER(Norm))]


class Linear(ctypes.Structure):
    """See `classification.h`."""

    _fields_ = [
        *((name, c_void_p) for name in ("weight", "bias", "of_weight", "of_bias")),
        ("classes", c_int),
    ]


_IMAGES = (c_int, c_int, c_int, c_int)  # number, side, channels, threads
_ROWS = (c_long, c_int, c_int)  # pixels, channels, threads
_POOLED = (c_int, c_int, c_int, c_int, c_int)  # rows, columns, channels of both, threads
_SIGNATURES = {
    "convolve3x3": (POINTER(Input), POINTER(Layer), c_void_p, *_IMAGES),
    "convolve3x3_backward": (POINTER(Input), POINTER(Layer), *[c_void_p] * 6, *_IMAGES),
    "convolve_pictures": (c_void_p, POINTER(Layer), c_void_p, *_IMAGES),
    "convolve_pictures_backward": (c_void_p, POINTER(Layer), *[c_void_p] * 3, *_IMAGES),
    "observe": (c_void_p, POINTER(Layer), *_ROWS),
    "observe_backward": (c_void_p, POINTER(Layer), *[c_void_p] * 3, *_ROWS),
    "complete": (POINTER(Input), *_ROWS),
    "complete_backward": (POINTER(Input), c_void_p, c_void_p, *_ROWS),
    "classify": (c_void_p, POINTER(Linear), *[c_void_p] * 3, *_IMAGES),  # pixels for the side
    "pool": (c_void_p, c_void_p, *_POOLED),
    "pool_backward": (c_void_p, c_void_p, *_POOLED),
}


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Let the functions of `library` check what they are called with."""
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def layer(of: kernels.Layer) -> tuple[Layer, Tensor]:
    """`of`, as the kernels see it, and the memory that they note statistics in, [4, channels]."""
    norm, channels = of.norm, of.weight.shape[0]
    noted = torch.empty(4, channels)
    norm.mean, norm.rstd = noted[:2].unbind()
    parameters = norm.weight, norm.bias, norm.weight_gradient, norm.bias_gradient
    tensors = (*parameters, norm.running_mean, norm.running_var, *noted.unbind())
    pointers = (tensor.data_ptr() for tensor in tensors)
    seen = Norm(*pointers, norm.momentum, norm.eps, 1.0)
    return Layer(of.weight.data_ptr(), of.weight_gradient.data_ptr(), seen), noted


def linear(of: kernels.Linear) -> Linear:
    """`of`, as the kernels see it."""
    tensors = of.weight, of.bias, of.weight_gradient, of.bias_gradient
    return Linear(*(tensor.data_ptr() for tensor in tensors), len(of.bias))
