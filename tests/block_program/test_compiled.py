"""The kernels that PyTorch's compiler fuses, and the functions they are made of, against autograd
in float64."""

import shutil

import pytest
import torch

import stochastic_depth.block_program.compiled as compiled
from stochastic_depth.block_program.compiled import CompiledKernels
from stochastic_depth.block_program.kernels import BatchNorm, Kernels

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++: the compiler's")


def image(seed, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 16, 5, 4, generator=rng, dtype=torch.float64)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def norm_of(factor, dtype):
    vectors = torch.rand(6, 16, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    factor = None if factor is None else torch.tensor(factor, dtype=dtype)
    return BatchNorm(*(vectors + 0.5).to(dtype).unbind(), 0.1, 1e-5, factor)


def outcome(kernels, dtype, factor, has_shortcut):
    norm = norm_of(factor, torch.promote_types(dtype, torch.float32))
    x, shortcut, gradient = (image(seed, dtype) for seed in (0, 1, 2))
    out = kernels.normalise(x, norm, shortcut if has_shortcut else None, torch.empty_like(x))
    grad_x = kernels.normalise_backward(gradient, out, x, norm)
    written = norm.running_mean, norm.running_var, norm.weight_gradient, norm.bias_gradient
    return [tensor.double() for tensor in (out, grad_x, gradient, *written)]


@pytest.mark.parametrize("factor", [None, 1.25])
@pytest.mark.parametrize("has_shortcut", [True, False])
def test_the_functions_are_the_reference_in_float64(factor, has_shortcut, monkeypatch):
    monkeypatch.setattr(compiled, "_compiled", lambda function: function)
    mine, reference = (
        outcome(kernels, torch.float64, factor, has_shortcut)
        for kernels in (CompiledKernels(), Kernels())
    )
    torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-13)


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str
)
def test_compiled_they_are_the_functions(dtype, tolerance):
    exact = outcome(Kernels(), torch.float64, 1.25, True)
    for mine, truth in zip(outcome(CompiledKernels(), dtype, 1.25, True), exact, strict=True):
        assert (mine - truth).norm() <= tolerance * truth.norm()
