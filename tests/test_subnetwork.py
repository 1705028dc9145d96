"""`handle.subnetwork` against the same sums written out, over all 2^L patterns."""

import contextlib
import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth.models import CifarResNet

pytestmark = pytest.mark.usefixtures("one_thread")
BLOCKS = 6
PATTERNS = list(itertools.product((False, True), repeat=BLOCKS))


def trained(depth: int = 14) -> CifarResNet:
    """With running statistics that are not those of its beginning, in float64."""
    model = CifarResNet(depth, init="he").double()
    rng = torch.Generator().manual_seed(0)
    for _ in range(3):
        model(torch.randn(4, 3, 8, 8, generator=rng, dtype=torch.float64))
    return model.eval()


def images() -> Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, 8, 8, generator=rng, dtype=torch.float64)


def by_hand(model: CifarResNet, x: Tensor, factors) -> Tensor:
    """The network with each branch times a factor, 0 for a closed one; every branch is run."""
    h = model.stem(x)
    for unit, factor in zip(model.blocks, factors, strict=True):
        shortcut = h if unit.shortcut is None else unit.shortcut(h)
        h = F.relu(shortcut + factor * unit.branch(h))
    return model.head(h.mean((2, 3)))


@pytest.mark.parametrize("gate", ["batch", "sample", "subset"])
@pytest.mark.parametrize("scale", ["inference", "training"])
def test_every_subnetwork_of_six_blocks_is_the_sum_written_out(scale, gate) -> None:
    model, plain, x = trained(), trained(), images()
    handle = sd.apply(model, sd.LinearDecay(0.3), scale=scale, gate=gate)
    in_training = [1 / p if scale == "training" else 1 for p in handle.survival]
    in_evaluation = [p if scale == "inference" else 1 for p in handle.survival]
    with torch.no_grad():
        for pattern in PATTERNS:
            for scaled, counted in ((False, in_training), (True, in_evaluation)):
                factors = [b * factor for b, factor in zip(pattern, counted, strict=True)]
                with handle.subnetwork(pattern, scaled=scaled):
                    out = model(x)
                torch.testing.assert_close(out, by_hand(plain, x, factors))


def test_the_branch_of_a_closed_block_is_not_executed() -> None:
    model = trained()
    handle = sd.apply(model)
    ran: list[int] = []
    for number, unit in enumerate(model.blocks):
        unit.branch.register_forward_hook(lambda *_, number=number: ran.append(number))
    for pattern in PATTERNS:
        ran.clear()
        with handle.subnetwork(torch.tensor(pattern)):
            model(images())
        assert ran == [number for number in range(BLOCKS) if pattern[number]]


class Linear(nn.Module):
    """Six linear blocks without activation: H + A H."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        units = (sd.Residual(nn.Linear(4, 4, bias=False)) for _ in range(BLOCKS))
        self.blocks = nn.Sequential(*units)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


@pytest.mark.parametrize("scale", ["inference", "training"])
def test_of_a_linear_network_the_full_one_is_the_exact_mean_of_its_subnetworks(scale) -> None:
    """The paper, section 3: evaluation with p_l stands for all 2^L networks."""
    model = Linear().eval()
    handle = sd.apply(model, sd.LinearDecay(0.2), scale=scale)
    x = torch.randn(5, 4, dtype=torch.float64)
    mean = torch.zeros_like(x)
    for pattern in PATTERNS:
        chance = math.prod(p if b else 1 - p for p, b in zip(handle.survival, pattern, strict=True))
        with handle.subnetwork(pattern):
            mean += chance * model(x)
    torch.testing.assert_close(mean, model(x))


def test_what_was_before_comes_back_whatever_happens() -> None:
    model, x = trained(), images()
    handle = sd.apply(model, sd.LinearDecay(0.3))
    full = model(x)
    with handle.subnetwork([True] * BLOCKS):
        unscaled = model(x)
        with contextlib.suppress(RuntimeError), handle.subnetwork([False] * BLOCKS):
            assert not torch.equal(model(x), unscaled)
            raise RuntimeError
        assert torch.equal(model(x), unscaled)
    assert torch.equal(model(x), full)
    assert not torch.equal(full, unscaled)


def test_training_steps_are_not_concerned_and_a_schedule_goes_on() -> None:
    models = [trained(), trained()]
    rule = sd.LinearDecay(0.3)
    depths = [sd.apply(model, rule, schedule=sd.Warmup(3), seed=4) for model in models]
    for step in range(4):
        with depths[0].subnetwork([step % 2 == 0] * BLOCKS):
            outs = [model.train()(images()) for model in models]
        assert torch.equal(*outs)
        assert torch.equal(depths[0].gates, depths[1].gates)
        assert torch.equal(*(model.eval()(images()) for model in models))
    assert depths[0].survival == pytest.approx(sd.apply(trained(), rule).survival)


@pytest.mark.parametrize("inner", ["forced", "full_depth", "model"])
def test_the_gates_of_a_running_pass_are_in_force_again_after_a_context_in_it(inner) -> None:
    model, x = trained().train(), torch.randn(3, 16, 8, 8, dtype=torch.float64)
    handle = sd.apply(model, sd.Uniform(0.5), seed=1)
    first = model.blocks[0]
    with handle.draw():
        expected = first(x)
        with handle.full_depth() if inner == "full_depth" else handle.forced([False] * BLOCKS):
            if inner == "model":
                model(images())  # a pass in the pass leaves the gates that are forced
            other = first(x)
        assert torch.equal(first(x), expected)
        assert not torch.equal(other, expected)
    assert handle.gates_at(0)[0]
    with pytest.raises(sd.errors.GateError, match="outside of a forward pass"):
        first(x)


def test_at_full_depth_the_gates_of_evaluation_are_those_of_now() -> None:
    model, x = trained().train(), torch.randn(3, 16, 8, 8, dtype=torch.float64).relu()
    handle = sd.apply(model, sd.Uniform(0.5))
    with handle.full_depth():
        whole = model.blocks[0](x)
        with handle.subnetwork([False] * BLOCKS):
            assert torch.equal(model.blocks[0](x), x)
        assert torch.equal(model.blocks[0](x), whole)


def test_forced_gates_of_samples_open_a_block_that_does_not_run_yet() -> None:
    model, x = trained(), images()
    rule = [0.5] * (BLOCKS - 1) + [0.0]
    handle = sd.apply(model, rule, schedule=sd.Steps({0: 1.0}), gate="sample")
    with handle.forced([True] * BLOCKS):
        expected = model(x)
    with handle.forced(torch.ones(BLOCKS, len(x), dtype=torch.bool)):
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"gate": "sample"},
        {"gate": "sample", "balance": True},
        {"gate": "subset"},
        {"gate": "subset", "balance": True},
        {"gate": "subset", "min_samples": 3},
    ],
    ids=str,
)
def test_forced_gates_of_a_step_repeat_it(options) -> None:
    model, x = trained(), images()
    handle = sd.apply(model, sd.Uniform(0.6), scale="training", **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0
    drawn = model.train()(x)
    with handle.forced(handle.gates):
        assert torch.equal(model(x), drawn)


@pytest.mark.parametrize("force", ["subnetwork", "forced"])
def test_a_copy_has_its_usual_gates(force: str) -> None:
    model = trained()
    handle = sd.apply(model, sd.Uniform(0.5), seed=3)
    full = model(images())
    with getattr(handle, force)([False] * BLOCKS):
        copied = copy.deepcopy(model)
        assert torch.equal(copied(images()), full)
        assert not torch.equal(model(images()), full)
    copied.train()(images())
    assert torch.equal(sd.handle_of(copied).gates, handle.gates_at(0))


@pytest.mark.parametrize("gates", [[True] * 5, [1.0] * BLOCKS, [[True] * BLOCKS], True, [1] * 6])
def test_gates_of_another_form_are_refused(gates) -> None:
    handle = sd.apply(trained())
    with pytest.raises(sd.errors.GateError, match=r"bool \[6\], one gate for each block"):
        handle.subnetwork(gates).__enter__()


class TwoSums(nn.Module):
    """As a transformer's block: two additions, in a class that knows nothing of this library."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.one(x))
        return x + torch.tanh(self.two(x))


class PostActivation(nn.Module):
    """A projection, an addition in place and an activation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.project = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.two(torch.tanh(self.one(x)))
        out += self.project(x)
        return self.act(out)


def of_two_sums(block: TwoSums, x: Tensor, one: float, two: float) -> Tensor:
    x = x + one * torch.tanh(block.one(x))
    return x + two * torch.tanh(block.two(x))


def of_post_activation(block: PostActivation, x: Tensor, factor: float) -> Tensor:
    return F.relu(block.project(x) + factor * block.two(torch.tanh(block.one(x))))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("granularity", ["block", "unit"])
def test_foreign_models_have_subnetworks_too(granularity, scaled) -> None:
    torch.manual_seed(0)
    blocks = [TwoSums(), PostActivation(), TwoSums()]
    model, plain = (nn.Sequential(*copy.deepcopy(blocks)).double().eval() for _ in range(2))
    x = torch.randn(5, 4, dtype=torch.float64)
    handle = sd.apply(model, sd.LinearDecay(0.3), example=x, granularity=granularity)
    gates = len(handle.blocks)
    assert gates == {"block": 3, "unit": 5}[granularity]
    for pattern in itertools.product((False, True), repeat=gates):
        p = handle.survival if scaled else [1.0] * gates
        b = [bool(is_open) * factor for is_open, factor in zip(pattern, p, strict=True)]
        if granularity == "block":
            b = [b[0], b[0], b[1], b[2], b[2]]
        expected = of_two_sums(plain[0], x, b[0], b[1])
        expected = of_post_activation(plain[1], expected, b[2])
        expected = of_two_sums(plain[2], expected, b[3], b[4])
        with handle.subnetwork(pattern, scaled=scaled):
            torch.testing.assert_close(model(x), expected)
