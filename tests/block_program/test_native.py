"""The compiled kernels against float64 convolution and batch normalisation by the textbook."""

import pytest
import torch

from stochastic_depth.block_program import Program
from stochastic_depth.block_program.kernels import Kernels, Linear
from stochastic_depth.block_program.library import why_unavailable
from stochastic_depth.block_program.native import NativeKernels
from stochastic_depth.models import CifarResNet
from stochastic_depth.train.build import build_optimizer
from stochastic_depth.train.config import OptimizerConfig
from support.kernels import (
    assert_as_exact,
    check_a_branch,
    check_a_large_mean,
    check_a_transition,
    check_another_first_convolution,
    check_pooling_and_padding,
    check_the_head,
    check_the_stem,
    check_two_branches,
    gradients,
    image,
    layer_of,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        why_unavailable() is not None, reason=f"needs native kernels: {why_unavailable()}"
    ),
]
SHAPES = [
    *((4, 16, 32), (5, 16, 16), (5, 32, 16), (9, 64, 8), (2, 64, 16)),
    *((5, 16, 8), (3, 16, 24), (7, 32, 4), (3, 32, 12), (9, 64, 2), (3, 64, 6)),  # narrow
]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("factor", [None, 1.25])
@pytest.mark.parametrize(("n", "channels", "side"), SHAPES)
def test_a_branch_and_all_its_gradients(n, channels, side, factor, threads):
    check_a_branch(n, channels, side, factor, threads)


@pytest.mark.parametrize(("channels", "side"), [(16, 16), (32, 16), (64, 8)])
def test_what_a_branch_gives_is_written_by_the_next(channels, side):
    check_two_branches(channels, side)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("n", "channels", "side"), [(4, 16, 32), (5, 16, 16), (9, 16, 8), (4, 32, 16), (9, 32, 4)]
)
def test_a_transition_and_all_its_gradients(n, channels, side, dtype, threads):
    check_a_transition(n, channels, side, dtype, threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("channels", "size"), [(16, (16, 16)), (32, (8, 12)), (6, (6, 4))])
def test_pooling_and_padding(channels, size, dtype):
    check_pooling_and_padding(channels, size, dtype)


def test_a_large_mean_costs_no_digits():
    check_a_large_mean()


@pytest.mark.parametrize(("into", "side", "stride"), [(8, 16, 1), (16, 32, 2)])
def test_a_first_convolution_of_another_form_is_the_references(into, side, stride):
    check_another_first_convolution(into, side, stride)


@pytest.mark.parametrize(("side", "dtype"), [(12, torch.bfloat16), (16, torch.float32)])
def test_a_branch_of_another_form_is_the_references(side, dtype):
    outcomes = []
    for kernels in (NativeKernels(), Kernels()):
        layers = layer_of(16), layer_of(16)
        for layer in layers:
            layer.weight = layer.weight.to(dtype)
        x, gradient = (image(3, 16, side, seed).to(dtype) for seed in (0, 1))
        out, grad_x = torch.empty_like(x), torch.zeros_like(x)
        saved = kernels.branch(x, *layers, x, out)
        kernels.branch_backward(saved, x, *layers, out, gradient, lambda grad_x=grad_x: grad_x)
        outcomes.append((out, grad_x, *(layer.weight_gradient for layer in layers)))
    torch.testing.assert_close(*outcomes, rtol=0, atol=0)


@pytest.mark.parametrize(("channels", "side"), [(1, 16), (3, 32), (4, 16), (3, 10), (5, 16)])
def test_the_stem_and_its_gradients(channels, side):
    check_the_stem(channels, side)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["pixel", "weight"])
@pytest.mark.parametrize("size", [8, 32])
def test_what_is_not_a_number_reaches_the_loss(size, where, value, dtype):
    model = CifarResNet(8).train()
    images = torch.ones(2, 3, size, size)
    with torch.no_grad():
        target = images if where == "pixel" else model.blocks[1].branch[0].weight
        target[1, 0, 0, 0] = value
    optimizer = build_optimizer(OptimizerConfig(), model)
    program = Program(model, None, optimizer, images.shape, dtype, NativeKernels(dtype))
    assert not program.step(images, torch.tensor([0, 1])).isfinite()


def test_memory_does_not_grow_from_step_to_step():
    model = CifarResNet(20).train()
    optimizer = build_optimizer(OptimizerConfig(), model)
    kernels = NativeKernels()
    shape = (2, 3, 32, 32)
    program = Program(model, None, optimizer, shape, torch.bfloat16, kernels)
    held = []
    for step in range(4):
        program.step(torch.randn(shape), torch.tensor([step, 0]))
        held.append([tensor.data_ptr() for tensor in (*kernels._buffers, *program.buffers)])
    assert len(held[0]) > 20
    assert [*map(sorted, held)] == [sorted(held[0])] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [(32, 32), (16, 16), (16, 32)])
@pytest.mark.parametrize("closed", [(), (0,), (3,), (6,), (8,), (2, 3, 4), (3, 5, 6, 7), range(9)])
def test_a_step_under_gates_is_as_exact_as_by_pytorchs_kernels(closed, size, dtype):
    assert_as_exact(closed, dtype, size)


@pytest.mark.parametrize(("channels", "classes"), [(64, 10), (16, 100), (32, 1)])
def test_the_head_and_its_gradients(channels, classes):
    check_the_head(channels, classes)


def test_the_sums_are_the_same_whichever_thread_takes_a_part():
    torch.set_num_threads(3)
    first, *others = (
        gradients((1, 5), torch.float32, NativeKernels(), (32, 32), torch.bfloat16)
        for _ in range(5)
    )
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


def test_the_threads_are_those_that_pytorch_has_at_the_time():
    def gradient_of_weights(at_first, later):
        torch.set_num_threads(at_first)
        kernels, first, second = NativeKernels(), layer_of(16), layer_of(16)
        torch.set_num_threads(later)
        x, gradient = image(64, 16, 32, 0), image(64, 16, 32, 1)
        out = torch.empty_like(x)
        saved = kernels.branch(x, first, second, x, out)
        kernels.materialise(out)
        kernels.branch_backward(saved, x, first, second, out, gradient, lambda: gradient)
        return first.weight_gradient

    by_one = gradient_of_weights(1, 1)
    assert gradient_of_weights(2, 1).equal(by_one)
    assert not gradient_of_weights(1, 2).equal(by_one)  # they are added in another order


def test_a_label_of_no_class_is_refused():
    x, weight, bias = image(2, 16, 8, 0), torch.zeros(10, 16), torch.zeros(10)
    with pytest.raises(IndexError, match="labels from 3 to 10: there are 10 classes"):
        NativeKernels().head(x, Linear(weight, bias, weight, bias), torch.tensor([3, 10]), x)
