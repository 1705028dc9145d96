"""The compiled kernels against float64 convolution and batch normalisation by the textbook."""

import copy

import pytest
import torch
import torch.nn.functional as F

from stochastic_depth.engine.kernels import BatchNorm, NativeKernels, ReferenceKernels
from stochastic_depth.engine.kernels.native import missing

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(missing() is not None, reason=f"needs native kernels: {missing()}"),
]
SHAPES = [(3, 16, 32), (2, 16, 16), (5, 32, 16), (3, 64, 8), (1, 64, 16)]
ROUNDING = 2**-8
"""Half a unit in the last place of bfloat16, relative."""


def image(n, channels, side, seed, mean=0.0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, channels, side, side, generator=rng) + mean
    return x.bfloat16().contiguous(memory_format=torch.channels_last)


def weights(channels, into=None):
    rng = torch.Generator().manual_seed(9)
    w = torch.randn(channels, into or channels, 3, 3, generator=rng) / channels
    return w.bfloat16().contiguous(memory_format=torch.channels_last)


def norm_of(channels, factor=None):
    rng = torch.Generator().manual_seed(5)
    vectors = torch.rand(6, channels, generator=rng) + 0.5
    factor = None if factor is None else torch.tensor(factor)
    return BatchNorm(*vectors.unbind(), momentum=0.1, eps=1e-5, factor=factor)


def close(mine, exact, rounding=ROUNDING):
    scale = exact.abs().amax().item()
    torch.testing.assert_close(mine.double(), exact, rtol=rounding, atol=rounding * scale / 16)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("n", "channels", "side"), SHAPES)
def test_convolution_and_both_gradients(n, channels, side, threads):
    torch.set_num_threads(threads)
    kernels = NativeKernels()
    x, w, gradient = image(n, channels, side, 0), weights(channels), image(n, channels, side, 1)
    exact_x, exact_w = x.double().requires_grad_(), w.double().requires_grad_()
    exact = F.conv2d(exact_x, exact_w, padding=1)
    exact.backward(gradient.double())
    close(kernels.convolve(x, w, 1), exact.detach())
    of_w = torch.full_like(w, torch.nan, dtype=torch.float32)
    close(kernels.convolve_backward(gradient, x, w, 1, of_w), exact_x.grad)
    close(of_w, exact_w.grad, 1e-5)


def test_the_gradient_of_the_input_can_be_added():
    x, gradient, total = (image(2, 16, 16, seed) for seed in (0, 1, 2))
    w, of_w = weights(16), torch.empty(16, 16, 3, 3).contiguous(memory_format=torch.channels_last)
    exact = total.double() + F.conv_transpose2d(gradient.double(), w.double(), padding=1)
    result = NativeKernels().convolve_backward(gradient, x, w, 1, of_w, add_to=total)
    assert result is total
    close(total, exact)


@pytest.mark.parametrize("factor", [None, 1.25])
@pytest.mark.parametrize("has_shortcut", [True, False])
@pytest.mark.parametrize(("n", "channels", "side", "mean"), [(3, 16, 8, 0), (2, 48, 5, 30)])
def test_normalisation_and_its_gradients(n, channels, side, mean, has_shortcut, factor):
    torch.set_num_threads(2)
    kernels, norm = NativeKernels(), norm_of(channels, factor)
    before = copy.deepcopy(norm)
    x = image(n, channels, side, 0, mean)
    shortcut = image(n, channels, side, 1) if has_shortcut else None
    out = kernels.normalise(x, norm, shortcut)
    exact_x = x.double().requires_grad_()
    w, b = (v.double().requires_grad_() for v in (before.weight, before.bias))
    running = before.running_mean.double(), before.running_var.double()
    branch = F.batch_norm(exact_x, *running, w, b, True, 0.1, 1e-5)
    branch = branch if factor is None else factor * branch
    total = branch if shortcut is None else branch + shortcut.double()
    total.retain_grad()
    exact = F.relu(total)
    close(out, exact.detach())
    close(norm.running_mean, running[0], 1e-5)
    close(norm.running_var, running[1], 1e-5)
    gradient = image(n, channels, side, 2)
    exact.backward(gradient.double())
    of_x = kernels.normalise_backward(gradient, out, x, norm, has_shortcut)
    close(of_x, exact_x.grad)
    close(norm.weight_gradient, w.grad, 1e-4)
    close(norm.bias_gradient, b.grad, 1e-4)
    if has_shortcut:
        close(gradient, total.grad)


@pytest.mark.parametrize(
    ("n", "channels", "into", "side", "stride"),
    [(2, 16, 3, 8, 1), (2, 32, 16, 8, 2), (2, 16, 16, 12, 1), (2, 64, 64, 4, 1)],
)
def test_other_forms_are_the_references(n, channels, into, side, stride):
    x, w = image(n, into, side, 0), weights(channels, into)
    assert NativeKernels().convolve(x, w, stride).equal(ReferenceKernels().convolve(x, w, stride))
