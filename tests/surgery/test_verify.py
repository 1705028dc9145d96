"""`sd.verify`: proof on a model that has stochastic depth, and what skipping saves."""

import pytest
import torch
from torch import nn

import stochastic_depth as sd
from stochastic_depth.models import CifarResNet
from support.blocks import WIDTH, InPlace, Left, X, network

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("gate", ["batch", "sample", "subset"])
def test_a_sound_model_is_verified_and_left_as_it_was(gate):
    model = network(InPlace)
    handle = sd.apply(model, sd.LinearDecay(0.5), example=X, gate=gate)
    model.train()(X).sum().backward()
    state, survival = handle.state_dict(), handle.survival
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    result = sd.verify(model, X, repeats=2)
    assert (result.blocks, result.difference) == (3, 0)
    assert result.sets == 1 + 3  # all of them, and three of which each holds another block
    assert result.flops[0] == 1 > result.flops[1] > result.flops[2]
    assert handle.state_dict() == state
    assert handle.survival == survival
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert (p.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(p.grad, gradient)
    assert "3 blocks verified in 4 sets" in str(result)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_part_that_was_scripted_since_is_no_obstacle():
    model = nn.Sequential(network(Left), nn.Linear(WIDTH, 2).to(X))
    sd.apply(model, example=X)
    model[1] = torch.jit.script(model[1])
    assert sd.verify(model, X, repeats=1).difference == 0
    assert sd.summary(model, X).expected_saving > 0


def test_time_is_saved():
    model = nn.Sequential(nn.Linear(4, 256), *(Wide() for _ in range(4)))
    x = torch.randn(256, 4)
    sd.apply(model, sd.Uniform(0.5), example=x[:2])
    result = sd.verify(model, x, repeats=5)
    assert result.seconds[0] > 1.2 * result.seconds[1] > 1.2 * result.seconds[2]


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(256, 1024), nn.Linear(1024, 256)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, memory):
        return x + self.f(memory)


class EncodesForTheFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(WIDTH, WIDTH)
        self.first, self.second = Reads(), Reads()

    def forward(self, x):
        x = self.first(x, self.encoder(x))
        return self.second(x, x)


def test_flops_are_those_of_the_step_also_where_a_closed_block_spares_what_comes_before_it():
    model = EncodesForTheFirst()
    x = torch.randn(5, WIDTH)
    sd.apply(model, example=x)
    # In products of one layer: 3 forward, and backward 1 + 2 + 2; without the second block 2 and 3;
    # without any none, because only the first block reads what is encoded.
    assert sd.verify(model, x, repeats=1).flops == (1, 5 / 8, 0)


def test_residual_units_are_held_against_themselves_without_gates():
    model = CifarResNet(14)
    sd.apply(model)
    assert sd.verify(model, torch.randn(2, 3, 32, 32), repeats=2).blocks == 6


def test_what_does_not_hold_is_named():
    model = network(Left)
    handle = sd.apply(model, example=X)
    type(model[2]).forward, right = Left.forward, type(model[2]).forward
    try:
        with pytest.raises(sd.errors.UnsupportedBlockError, match=r"block '1'.* with '1' closed"):
            sd.verify(model, X)
    finally:
        type(model[2]).forward = right
    assert sd.verify(model, X, repeats=2).blocks == len(handle.blocks)


class SumsUp(nn.Module):
    def forward(self, x):
        return x.cumsum(0)


@pytest.mark.parametrize("gate", ["sample", "subset"])
def test_gates_for_single_samples_need_samples_in_the_first_dimension(gate):
    model = nn.Sequential(nn.Linear(4, WIDTH), sd.Residual(SumsUp())).double()
    sd.apply(model, sd.Uniform(0.5), gate=gate)
    with pytest.raises(sd.errors.ApplyError, match="the first dimension is not the batch"):
        sd.verify(model, X)
    with pytest.raises(sd.errors.ApplyError, match="at least two samples"):
        sd.verify(model, X[:1])


def test_a_model_without_stochastic_depth_is_an_error():
    with pytest.raises(sd.errors.ApplyError, match="no stochastic depth"):
        sd.verify(nn.Linear(WIDTH, WIDTH), X)


def test_no_round_to_time_is_an_error():
    model = network(Left)
    sd.apply(model, example=X)
    with pytest.raises(sd.errors.ApplyError, match="repeats=0: at least one"):
        sd.verify(model, X, repeats=0)
