"""The handle in the training loops that people have: accumulation, averages, loss scaling."""

import copy
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import stochastic_depth as sd
from stochastic_depth.draw import draw

BLOCKS = 6
HALF = sd.LinearDecay(0.5)
pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> nn.Sequential:
    """Six residual blocks of a linear layer and a BatchNorm, in float64."""
    torch.manual_seed(0)
    blocks = [
        sd.Residual(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()))
        for _ in range(BLOCKS)
    ]
    return nn.Sequential(nn.Linear(3, 4), *blocks, nn.Linear(4, 2)).double()


def batch(number: int, samples: int = 8) -> Tensor:
    rng = torch.Generator().manual_seed(number)
    return torch.randn(samples, 3, dtype=torch.float64, generator=rng)


@pytest.mark.parametrize("gate", ["batch", "sample", "subset"])
def test_the_step_may_be_the_optimizers_so_that_micro_batches_share_gates(gate) -> None:
    model = network()
    handle = sd.apply(model, HALF, gate=gate, min_samples=2 if gate == "subset" else 0, seed=4)
    for step in range(5):
        for micro in range(3):
            handle.step = step
            model(batch(3 * step + micro)).sum().backward()
            samples = None if gate == "batch" else 8
            assert torch.equal(
                handle.gates, draw(4, step, handle.survival, samples, handle.settings.min_samples)
            )
        assert handle.step == step + 1


@pytest.mark.parametrize("skipped", ["paper", "freeze"])
def test_micro_batches_under_the_same_gates_add_up_to_the_batch(skipped) -> None:
    def without_batchnorm() -> nn.Module:
        return nn.Sequential(*(sd.Residual(nn.Linear(3, 3)) for _ in range(BLOCKS))).double()

    torch.manual_seed(0)
    whole = without_batchnorm()
    parts = copy.deepcopy(whole)
    sd.apply(whole, HALF, skipped=skipped).step = 7
    whole(batch(0)).square().sum().backward()
    handle = sd.apply(parts, HALF, skipped=skipped)
    for micro in batch(0).split(2):
        handle.step = 7
        parts(micro).square().sum().backward()
    assert not handle.gates.all()
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("integer", [np.int64, torch.tensor, int])
def test_every_kind_of_integer_is_the_same_step_and_seed(integer) -> None:
    model = network()
    handle = sd.apply(model, HALF, seed=integer(5))
    handle.step = integer(3)
    model(batch(0))
    assert torch.equal(handle.gates, draw(5, 3, handle.survival))
    assert torch.equal(handle.gates_at(integer(7)), draw(5, 7, handle.survival))
    handle.seed = integer(6)
    assert torch.equal(handle.gates_at(7), draw(6, 7, handle.survival))
    assert all(type(handle.state_dict()[name]) is int for name in ("seed", "step"))


@pytest.mark.parametrize("step", [1.5, "3", None, -1])
def test_what_is_no_step_is_refused_and_changes_nothing(step) -> None:
    handle = sd.apply(network(), HALF)
    handle.step = 4
    with pytest.raises(sd.errors.GateError, match=f"step={step!r}"):
        handle.step = step
    with pytest.raises(sd.errors.GateError, match=f"step={step!r}"):
        handle.gates_at(step)
    assert handle.step == 4
    with pytest.raises(sd.errors.GateError, match=r"seed=1\.5: gates are a function of integers"):
        handle.seed = 1.5
    model = network()
    with pytest.raises(sd.errors.GateError, match=r"seed=1\.5: gates are a function of integers"):
        sd.apply(model, HALF, seed=1.5)
    sd.apply(model, HALF)


def test_a_step_that_is_set_to_an_earlier_one_brings_its_probabilities() -> None:
    rule, ramp = sd.LinearDecay(0.5), sd.Warmup(10)
    handle = sd.apply(network(), rule, schedule=ramp)
    for step in (10, 9, 8, 7, 0):
        handle.step = step
        assert handle.survival == handle.survival_at(max(0, step - 1))
    with handle.draw():
        handle.step = 0
    assert handle.survival == handle.survival_at(0)
    handle.step = 5
    with handle.draw():
        handle.step = 5  # the next micro-batch is of the same step
    assert handle.survival == handle.survival_at(5)
    with handle.draw():
        pass
    resumed = sd.apply(network(), rule, schedule=ramp)
    resumed.load_state_dict(handle.state_dict())
    handle.step = resumed.step = 5  # a further micro-batch, after a resume too
    assert resumed.survival == handle.survival == handle.survival_at(5)


def test_an_average_has_gates_of_its_own_and_leaves_the_models_alone() -> None:
    model = network()
    handle = sd.apply(model, HALF)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    own = sd.handle_of(averaged.module)
    assert own is not handle
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    for step in range(4):
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(model)
        gates = handle.gates
        averaged.eval()(batch(99))
        averaged.train()(batch(99)).sum().backward()
        assert handle.step == step + 1
        assert torch.equal(handle.gates, gates)
        assert torch.equal(own.gates, gates), "it counts by itself, from where it was copied"
    expected = averaged.eval()(batch(5))
    fresh = network()
    sd.apply(fresh, HALF)
    loaded = AveragedModel(fresh)
    loaded.load_state_dict(averaged.state_dict())
    assert torch.equal(loaded.eval()(batch(5)), expected)


def test_under_a_ramp_an_average_is_told_the_step_to_be_evaluated_at() -> None:
    model = network()
    handle = sd.apply(model, HALF, schedule=sd.Warmup(4))
    averaged = AveragedModel(model)
    for step in range(3):
        model(batch(step))
    averaged.update_parameters(model)
    own = sd.handle_of(averaged.module)
    assert own.survival == (1.0,) * BLOCKS
    own.step = handle.step
    assert own.survival == handle.survival != (1.0,) * BLOCKS
    assert torch.equal(
        averaged.eval()(batch(0)), _by_hand(averaged.module, batch(0), handle.survival)
    )


def _by_hand(model: nn.Module, x: Tensor, survival: tuple[float, ...]) -> Tensor:
    first, *blocks, last = model
    h = first(x)
    for block, p in zip(blocks, survival, strict=True):
        h = h + block.branch(h) * p
    return last(h)


@pytest.mark.parametrize("scale", ["inference", "training"])
def test_update_bn_at_full_depth_sees_the_network_that_is_evaluated(scale) -> None:
    model = network()
    handle = sd.apply(model, HALF, scale=scale)
    batches = [batch(step) for step in range(3)]
    with handle.full_depth():
        update_bn(batches, model)
    assert handle.step == 0
    means = torch.zeros(BLOCKS, 4, dtype=torch.float64)
    variances = torch.zeros(BLOCKS, 4, dtype=torch.float64)
    for x in batches:
        h = F.linear(x, model[0].weight, model[0].bias)
        for number, p in enumerate(handle.survival):
            linear, norm, _ = model[1 + number].branch
            z = F.linear(h, linear.weight, linear.bias)
            means[number] += z.mean(0) / 3
            variances[number] += z.var(0, unbiased=True) / 3
            z = (z - z.mean(0)) / (z.var(0, unbiased=False) + norm.eps).sqrt()
            h = h + (p if scale == "inference" else 1) * torch.tanh(z)
    norms = [block.branch[1] for block in model[1:-1]]
    torch.testing.assert_close(torch.stack([n.running_mean for n in norms]), means)
    torch.testing.assert_close(torch.stack([n.running_var for n in norms]), variances)


def test_update_bn_under_gates_leaves_closed_blocks_without_statistics() -> None:
    model = network()
    handle = sd.apply(model, sd.Uniform(0.3))
    update_bn([batch(0)], model)
    closed = [block for block, b in zip(model[1:-1], handle.gates, strict=True) if not b]
    assert closed
    assert all(not block.branch[1].running_mean.any() for block in closed)


def test_full_depth_ends_and_the_gates_go_on_where_they_were() -> None:
    model, twin = network(), network()
    handle, other = sd.apply(model, HALF), sd.apply(twin, HALF)
    for step in range(6):
        with handle.full_depth(), handle.full_depth():
            model.requires_grad_(False)(batch(9))
            model.requires_grad_(True)
            assert handle.gates.tolist() == [True] * BLOCKS
        with pytest.raises(sd.errors.GateError, match="no gates are drawn for it"):
            model[1](torch.zeros(2, 4).double())
        model(batch(step))
        twin(batch(step))
        assert torch.equal(handle.gates, other.gates)
    with pytest.raises(RuntimeError, match="raised under full depth"), handle.full_depth():
        raise RuntimeError("raised under full depth")
    model(batch(0))
    assert handle.step == 7


def test_full_depth_between_forward_and_backward_changes_no_gradient() -> None:
    model, twin = network(), network()
    for m in (model, twin):
        handle = sd.apply(m, sd.Uniform(0.3), skipped="freeze")
        loss = m(batch(0)).square().sum()
        if m is model:
            with handle.full_depth(), torch.no_grad():
                copy.deepcopy(m)(batch(1))
        loss.backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("skipped", ["paper", "freeze"])
def test_a_gradient_scaler_scales_and_skips_as_it_does_without(skipped) -> None:
    model, twin = network().float(), network().float()
    for m in (model, twin):
        sd.apply(m, sd.Uniform(0.5), skipped=skipped)
    plain, scaled = (torch.optim.SGD(m.parameters(), 0.01, 0.9) for m in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(8):
        x = batch(step).float()
        plain.zero_grad()
        model(x).square().mean().backward()
        plain.step()
        scaled.zero_grad()
        scaler.scale(twin(x).square().mean()).backward()
        scaler.step(scaled)
        scaler.update()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    before = copy.deepcopy(twin.state_dict())
    scaler.scale(twin(batch(0).float()).sum() * float("inf")).backward()
    scaler.step(scaled)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(p, before[name]) for name, p in twin.named_parameters())


class Multiplied(nn.Module):
    """The reference: a block whose closed branch is multiplied by zero."""

    def __init__(self, block: sd.Residual) -> None:
        super().__init__()
        self.branch, self.factor = block.branch, 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.factor * self.branch(x)


def adapted(model: nn.Module, close, patterns, retain=()) -> dict[str, Tensor]:
    """Two steps of MAML's inner loop under the first gates, and the backward pass of the outer loss
    under the last ones; returns the fast weights named in `retain`."""
    weights = dict(model.named_parameters())
    for number, gates in enumerate(patterns):
        with close(gates):
            loss = functional_call(model, weights, (batch(number),)).square().sum()
            if number + 1 == len(patterns):
                for name in retain:
                    weights[name].retain_grad()
                loss.backward()
                return {name: weights[name] for name in retain}
            gradients = torch.autograd.grad(
                loss, list(weights.values()), create_graph=True, materialize_grads=True
            )
            new = zip(weights.items(), gradients, strict=True)
            weights = {name: weight - 0.1 * gradient for (name, weight), gradient in new}
    raise AssertionError


def maml_blocks() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = (sd.Residual(nn.Sequential(nn.Linear(4, 4), nn.Tanh())) for _ in range(3))
    return nn.Sequential(nn.Linear(3, 4), *blocks, nn.Linear(4, 2)).double()


@pytest.mark.parametrize("skipped", ["paper", "freeze"])
@pytest.mark.parametrize("outer", [(True, False, True), (False, False, False)])
@pytest.mark.parametrize("inner", [(True, True, True), (True, False, True)])
def test_fast_weights_of_closed_blocks_get_the_gradients_of_a_branch_times_zero(
    inner, outer, skipped
) -> None:
    patterns = [inner, inner, outer]
    model = maml_blocks()
    reference = copy.deepcopy(model)
    for number in (1, 2, 3):
        reference[number] = Multiplied(reference[number])

    @contextmanager
    def multiplied(gates):
        for block, is_open in zip(reference[1:4], gates, strict=True):
            block.factor = float(is_open)
        yield

    handle = sd.apply(model, HALF, skipped=skipped)
    retained = ["2.branch.0.weight"]
    with warnings.catch_warnings(action="error"):
        fast = adapted(model, lambda gates: handle.forced(list(gates)), patterns, retained)
    expected = adapted(reference, multiplied, patterns, retained)
    right = {name: p.grad for name, p in reference.named_parameters()}
    for name, p in model.named_parameters():
        if p.grad is None and skipped == "freeze":
            assert not right[name].any()
        else:
            torch.testing.assert_close(p.grad, right[name])
    if skipped == "paper":
        (got,), (wanted,) = fast.values(), expected.values()
        torch.testing.assert_close(got.grad, wanted.grad)
