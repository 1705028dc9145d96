"""What the compiled kernels must give, by float64 convolution and batch normalisation."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import stochastic_depth as sd
from stochastic_depth.block_program import Program
from stochastic_depth.block_program.kernels import BatchNorm, Kernels, Layer, Linear
from stochastic_depth.block_program.library import library
from stochastic_depth.block_program.native import NativeKernels
from stochastic_depth.models import CifarResNet
from stochastic_depth.train.build import build_optimizer
from stochastic_depth.train.config import OptimizerConfig

ROUNDING = 2**-8
"""Half a unit in the last place of bfloat16, relative."""


def image(n, channels, side, seed, mean=0.0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, channels, side, side, generator=rng) + mean
    return x.bfloat16().contiguous(memory_format=torch.channels_last)


def layer_of(channels, into=None, factor=None, seed=5):
    rng = torch.Generator().manual_seed(seed)
    vectors = torch.rand(6, channels, generator=rng) + 0.5
    factor = None if factor is None else torch.tensor(factor)
    norm = BatchNorm(*vectors.unbind(), momentum=0.1, eps=1e-5, factor=factor)
    weight = torch.randn(channels, into or channels, 3, 3, generator=rng) / channels
    weight = weight.bfloat16().contiguous(memory_format=torch.channels_last)
    return Layer(weight, torch.full_like(weight, torch.nan, dtype=torch.float32), 1, norm)


class Exact:
    """conv and BN in float64, rounded to bfloat16 where a network in bfloat16 stores."""

    def __init__(self, layer):
        norm, self.layer = layer.norm, layer
        self.weight, self.gain, self.bias = (
            v.double().requires_grad_() for v in (layer.weight, norm.weight, norm.bias)
        )
        self.running = norm.running_mean.double(), norm.running_var.double()
        self.factor = 1.0 if norm.factor is None else norm.factor.item()

    def __call__(self, x):
        a = stored(F.conv2d(x, self.weight, stride=self.layer.stride, padding=1), self.layer)
        return self.factor * F.batch_norm(a, *self.running, self.gain, self.bias, True, 0.1, 1e-5)

    def check(self, layer, rounding=2 * ROUNDING):
        close(layer.norm.running_mean, self.running[0], 1e-4)
        close(layer.norm.running_var, self.running[1], 1e-4)
        close(layer.weight_gradient, self.weight.grad, rounding)
        close(layer.norm.weight_gradient, self.gain.grad, rounding)
        close(layer.norm.bias_gradient, self.bias.grad, rounding)


def stored(x, layer):
    """As it is stored where the layer's weight is of this type."""
    return rounded(x) if layer.weight.dtype == torch.bfloat16 else x


def rounded(x):
    """In bfloat16, with the gradient of what was not rounded."""
    return x + (x.bfloat16().double() - x).detach()


def between(x, dtype=torch.bfloat16):
    """ReLU of what is between the convolutions, and not stored: it is rounded to be multiplied,
    where the processor multiplies bfloat16."""
    x = F.relu(x)
    return rounded(x) if library(dtype).rounds_factors() else x


def close(mine, exact, rounding=2 * ROUNDING):
    """By the norm of the difference, since what is rounded on the way is summed afterwards."""
    assert (mine.double() - exact).norm() <= rounding * exact.norm()


def check_a_branch(n, channels, side, factor, threads):
    if not library(torch.bfloat16).fits_images(side, channels, 1):
        pytest.skip(f"tiles have no form for {side}x{side} pixels of {channels} channels")
    torch.set_num_threads(threads)
    first, second = layer_of(channels), layer_of(channels, factor=factor, seed=6)
    exact_first, exact_second = Exact(first), Exact(second)
    x, gradient = image(n, channels, side, 0).relu_(), image(n, channels, side, 1)
    out = torch.full_like(x, torch.nan)

    exact_x = x.double().requires_grad_()
    total = exact_second(between(exact_first(exact_x))) + exact_x
    total.retain_grad()
    exact = F.relu(total)
    exact.backward(gradient.double())

    kernels = NativeKernels()
    saved = kernels.branch(x, first, second, x, out)
    assert sum(tensor.numel() for tensor in saved) < 2.1 * x.numel()
    close(kernels.materialise(out), exact.detach())
    kernels.branch_backward(saved, x, first, second, out, gradient, lambda: gradient)
    close(gradient, exact_x.grad)
    exact_first.check(first)
    exact_second.check(second)


def check_two_branches(channels, side):
    layers = [layer_of(channels, seed=seed) for seed in range(4)]
    exacts = [Exact(layer) for layer in layers]
    x, gradient = image(5, channels, side, 0).relu_(), image(5, channels, side, 1)
    middle, out = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)

    exact_x = x.double().requires_grad_()
    truth = exact_x
    for first, second in (exacts[:2], exacts[2:]):
        truth = rounded(F.relu(second(between(first(truth))) + truth))
    truth.backward(gradient.double())

    kernels = NativeKernels()
    one = kernels.branch(x, *layers[:2], x, middle)
    assert middle.isnan().all()
    two = kernels.branch(middle, *layers[2:], middle, out)
    close(kernels.materialise(out), truth.detach())
    kernels.branch_backward(two, middle, *layers[2:], out, gradient, lambda: gradient)
    assert not gradient[middle == 0].any()
    kernels.branch_backward(one, x, *layers[:2], middle, gradient, lambda: gradient)
    close(gradient, exact_x.grad, 4 * ROUNDING)
    for exact, layer in zip(exacts, layers, strict=True):
        exact.check(layer)


def check_pooling_and_padding(channels, size, dtype):
    half = tuple(side // 2 for side in size)
    x, gradient = (
        torch.randn(3, c, *s).to(dtype, memory_format=torch.channels_last)
        for c, s in ((channels, size), (2 * channels, half))
    )
    mine, grad_mine = torch.full_like(gradient, torch.nan), torch.full_like(x, torch.nan)
    exact_x = x.double().requires_grad_()
    exact = F.pad(F.avg_pool2d(exact_x, 2), (0, 0, 0, 0, 0, channels))
    exact.backward(gradient.double())
    kernels = NativeKernels()
    kernels.pool_and_pad(x, mine)
    close(mine, exact.detach(), ROUNDING)
    kernels.pool_and_pad_backward(gradient, grad_mine)
    close(grad_mine, exact_x.grad, ROUNDING)


def check_a_transition(n, channels, side, dtype, threads):
    """A branch, and one of stride 2 to twice the channels that reads what it gives."""
    if not library(dtype).fits_images(side, channels, 2):
        pytest.skip("tiles have no form for convolutions of stride 2")
    torch.set_num_threads(threads)
    layers = [layer_of(channels, seed=5), layer_of(channels, seed=6)]
    layers += [
        layer_of(2 * channels, channels, seed=7),
        layer_of(2 * channels, seed=8, factor=1.25),
    ]
    layers = [replace(layer, weight=layer.weight.to(dtype)) for layer in layers]
    layers[2].stride = 2
    exacts = [Exact(layer) for layer in layers]
    x = image(n, channels, side, 0).relu_().to(dtype)
    gradient = image(n, 2 * channels, side // 2, 1).to(dtype)

    exact_x = x.double().requires_grad_()
    exact_middle = F.relu(exacts[1](between(exacts[0](exact_x), dtype)) + exact_x)
    exact_middle = stored(exact_middle, layers[0])
    pooled = stored(F.pad(F.avg_pool2d(exact_middle, 2), (0, 0, 0, 0, 0, channels)), layers[0])
    truth = F.relu(exacts[3](between(exacts[2](exact_middle), dtype)) + pooled)
    truth.backward(gradient.double())

    kernels = NativeKernels(dtype)
    middle, grad_x = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    out, shortcut = torch.full_like(gradient, torch.nan), torch.full_like(gradient, torch.nan)
    one = kernels.branch(x, *layers[:2], x, middle)
    kernels.pool_and_pad(middle, shortcut)
    two = kernels.branch(middle, *layers[2:], shortcut, out)
    assert sum(tensor.numel() for tensor in two) == 2 * out.numel()
    most = 16 * ROUNDING if dtype == torch.bfloat16 else 1e-5
    close(kernels.materialise(out), truth.detach(), most)

    def grad_shortcut():
        kernels.pool_and_pad_backward(gradient, grad_x)
        return grad_x

    kernels.branch_backward(two, middle, *layers[2:], out, gradient, grad_shortcut)
    assert not grad_x[middle == 0].any()
    kernels.branch_backward(one, x, *layers[:2], middle, grad_x, lambda: grad_x)
    close(grad_x, exact_x.grad, most)
    for exact, layer in zip(exacts, layers, strict=True):
        exact.check(layer, most)


def check_a_large_mean():
    kernels, layer = NativeKernels(), layer_of(16)
    x = image(4, 16, 16, 0, mean=1000.0)
    kernels._library.batch_statistics(x.data_ptr(), kernels._layer(layer), *kernels._rows(x))
    exact = x.double()
    close(layer.norm.mean, exact.mean((0, 2, 3)), 1e-6)
    close(layer.norm.rstd, (exact.var((0, 2, 3), correction=0) + 1e-5).rsqrt(), 1e-5)


def check_another_first_convolution(into, side, stride):
    first, second = layer_of(16, into), layer_of(16)
    first.stride = stride
    exact_first, exact_second = Exact(first), Exact(second)
    x, shortcut = image(5, into, side, 0), image(5, 16, side // stride, 1)
    gradient, out, grad_x = image(5, 16, side // stride, 2), torch.empty_like(shortcut), x * 0
    exact_x = x.double().requires_grad_()
    exact = F.relu(exact_second(between(exact_first(exact_x))) + shortcut.double())
    exact.backward(gradient.double())
    kernels = NativeKernels()
    saved = kernels.branch(x, first, second, shortcut, out)
    close(kernels.materialise(out), exact.detach())
    kernels.branch_backward(saved, x, first, second, out, gradient, lambda: grad_x)
    close(grad_x, exact_x.grad)
    exact_first.check(first)
    exact_second.check(second)


def check_the_stem(channels, side):
    layer, gradient = layer_of(16, channels), image(4, 16, side, 1)
    exact, images, out = Exact(layer), image(4, channels, side, 0), torch.empty_like(gradient)
    truth = F.relu(exact(images.double()))
    truth.backward(gradient.double())
    kernels = NativeKernels()
    saved = kernels.stem(images, layer, out)
    close(kernels.materialise(out), truth.detach())
    kernels.stem_backward(saved, images, layer, out, gradient)
    exact.check(layer)


def check_the_head(channels, classes):
    x, labels = image(9, channels, 8, 0), torch.arange(9) * 7 % classes
    rng = torch.Generator().manual_seed(1)
    weight, bias = (
        torch.randn(classes, channels, generator=rng),
        torch.randn(classes, generator=rng),
    )
    exact = [v.double().requires_grad_() for v in (x, weight, bias)]
    loss = F.cross_entropy(F.linear(exact[0].mean((2, 3)), *exact[1:]), labels)
    loss.backward()
    layer = Linear(
        weight, bias, torch.full_like(weight, torch.nan), torch.full_like(bias, torch.nan)
    )
    gradient = torch.full_like(x, torch.nan)
    mine = NativeKernels().head(x, layer, labels, gradient)
    close(mine, loss.detach(), 1e-6)
    close(gradient, exact[0].grad, ROUNDING)
    close(layer.weight_gradient, exact[1].grad, 1e-6)
    close(layer.bias_gradient, exact[2].grad, 1e-6)


def gradients(closed, dtype, kernels, size, precision):
    """Of stem, blocks and head, each float64, after one step without the blocks `closed`."""
    model = CifarResNet(20).to(dtype, memory_format=torch.channels_last).train()
    handle = sd.apply(model, [1e-9 if block in closed else 1.0 for block in range(9)])
    images = image(4, 3, 32, 0)[..., : size[0], : size[1]].to(dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    optimizer = build_optimizer(OptimizerConfig(), model)
    program = Program(model, handle, optimizer, images.shape, precision, kernels)
    for buffer in program.gradients:
        buffer.fill_(torch.nan)
    program.step(images, torch.arange(4))
    assert handle.gates.tolist() == [block not in closed for block in range(9)]
    return [program.flat.gradients[segment].double() for segment in program.flat.segments]


def assert_as_exact(closed, dtype, size):
    exact = gradients(closed, torch.float64, Kernels(), size, torch.float64)
    pytorchs = gradients(closed, torch.float32, Kernels(), size, dtype)
    native = gradients(closed, torch.float32, NativeKernels(dtype), size, dtype)
    for block, (mine, theirs, true) in enumerate(zip(native, pytorchs, exact, strict=True), -1):
        assert true.any() != (block in closed)
        assert (mine - true).norm() <= 1.2 * (theirs - true).norm()
