"""What this library asks of PyTorch in private, asked of functions written in every way."""

import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from stochastic_depth.torch_private import function_around

seen: list[str | None] = []


def squared(x):
    seen.append(function_around(sys._getframe()))
    return x * x


class WithContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return squared(x)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient  # where x is 1


class Decorated(WithContext):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x):
        return squared(x)


class WithoutContext(WithContext):
    @staticmethod
    def forward(x):
        return squared(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


def squared_elsewhere(ctx, x):
    return squared(x)


class WrittenElsewhere(WithContext):
    forward = staticmethod(squared_elsewhere)


@pytest.mark.parametrize("function", [WithContext, Decorated, WithoutContext, WrittenElsewhere])
def test_a_forward_pass_knows_the_function_that_it_is_of(function):
    seen.clear()
    x = torch.ones(2, requires_grad=True)
    function.apply(x).sum().backward()
    assert seen == [function.__name__]
    assert torch.equal(x.grad, torch.full((2,), 2.0))


def test_what_has_run_before_it_becomes_a_forward_pass_is_known_there():
    def late(ctx, x):
        return squared(x)

    seen.clear()
    x = torch.ones(2)
    late(None, x)
    made = type("Made", (WithContext,), {"forward": staticmethod(late)})
    made.apply(x)
    assert seen == [None, "Made"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_outside_of_functions_and_in_a_checkpoint_there_is_none(reentrant):
    seen.clear()
    x = torch.ones(2, requires_grad=True)
    checkpoint(squared, squared(x), use_reentrant=reentrant).sum().backward()
    assert len(seen) == 3  # the last one in the backward pass
    assert set(seen) == {None}
