import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth.export.remove_blocks import ShortcutOnly
from stochastic_depth.gates import CLOSED, BlockGates, Gate, evaluation_gates, training_gates
from stochastic_depth.models.resnet import PoolAndPad

PATTERNS = list(itertools.product((False, True), repeat=6))
pytestmark = pytest.mark.usefixtures("one_thread")


class MustNotRun(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("a closed branch was called")


def post_activation(channels_in: int, channels: int) -> sd.Residual:
    halve = channels != channels_in
    return sd.Residual(
        nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, 1 + halve, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        ),
        shortcut=PoolAndPad(channels - channels_in) if halve else None,
        activation=nn.ReLU(),
    )


def pre_activation(channels: int) -> sd.Residual:
    return sd.Residual(
        nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        )
    )


def six_blocks() -> nn.Sequential:
    """Post-activation blocks around one halving of the resolution, then pre-activation ones."""
    torch.manual_seed(0)
    net = nn.Sequential(
        post_activation(3, 3),
        post_activation(3, 5),
        post_activation(5, 5),
        pre_activation(5),
        pre_activation(5),
        post_activation(5, 5),
    ).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    return net.train()


def set_gates(net: nn.Sequential, gates: list[Gate]) -> None:
    for unit, gate in zip(net, gates, strict=True):
        unit.gates = BlockGates(training=gate)


def norm(h: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """Batch normalisation of a training step, written out."""
    mean = h.mean((0, 2, 3), keepdim=True)
    variance = (h - mean).square().mean((0, 2, 3), keepdim=True)
    gain, bias = (weights[f"{name}.{key}"].view(1, -1, 1, 1) for key in ("weight", "bias"))
    return (h - mean) / (variance + 1e-5).sqrt() * gain + bias


def network_of_survivors(x: Tensor, weights: dict[str, Tensor], pattern: tuple) -> Tensor:
    """The same six blocks written out, with nothing but the shortcut where one is closed."""
    h = x
    for block, survives in enumerate(pattern):
        w = {
            key.removeprefix(f"{block}.branch."): value
            for key, value in weights.items()
            if key.startswith(f"{block}.branch.")
        }
        if block in (3, 4):
            if survives:
                h = h + F.conv2d(norm(h, w, "0").clamp(min=0), w["2.weight"], padding=1)
            continue
        shortcut = h
        if block == 1:
            halved = (
                h[:, :, ::2, ::2] + h[:, :, ::2, 1::2] + h[:, :, 1::2, ::2] + h[:, :, 1::2, 1::2]
            ) / 4
            shortcut = torch.cat((halved, torch.zeros_like(halved)[:, :2]), 1)
        if survives:
            f = F.conv2d(h, w["0.weight"], stride=2 if block == 1 else 1, padding=1)
            f = F.conv2d(norm(f, w, "1").clamp(min=0), w["3.weight"], padding=1)
            shortcut = shortcut + norm(f, w, "4")
        h = shortcut.clamp(min=0)
    return h


def test_under_every_gate_pattern_the_network_is_the_one_of_the_surviving_blocks() -> None:
    net = six_blocks()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    into = torch.randn(4, 5, 4, 4, dtype=torch.float64)
    for pattern in PATTERNS:
        set_gates(net, [Gate(open=b) for b in pattern])
        net.zero_grad()
        x.grad = y.grad = None
        out = net(x)
        out.backward(into)

        weights = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
        expected = network_of_survivors(y, weights, pattern)
        expected.backward(into)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-12)
        for name, parameter in net.named_parameters():
            assert (parameter.grad is None) == (weights[name].grad is None), (pattern, name)
            assert (parameter.grad is not None) == pattern[int(name[0])], (pattern, name)
            if parameter.grad is not None:
                torch.testing.assert_close(
                    parameter.grad, weights[name].grad, rtol=1e-10, atol=1e-12
                )


def test_closed_blocks_keep_their_batch_statistics_and_open_ones_update_them() -> None:
    net = six_blocks()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    for pattern in PATTERNS:
        before = {name: value.clone() for name, value in net.named_buffers()}
        set_gates(net, [Gate(open=b) for b in pattern])
        net(x)
        for name, value in net.named_buffers():
            assert torch.equal(value, before[name]) != pattern[int(name[0])], (pattern, name)


def test_an_open_block_updates_its_batch_statistics_as_the_plain_network_does() -> None:
    net = six_blocks()
    plain = copy.deepcopy(net)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    set_gates(net, [Gate()] * 6)
    torch.testing.assert_close(net(x), plain(x), rtol=0, atol=0)
    for (name, one), other in zip(net.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(one, other), name


def test_a_closed_block_runs_nothing() -> None:
    net = six_blocks()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    calls: list[int] = []
    for block, unit in enumerate(net):
        for module in unit.branch.modules():
            module.register_forward_hook(lambda *_, block=block: calls.append(block))
    for pattern in PATTERNS:
        calls.clear()
        set_gates(net, [Gate(open=b) for b in pattern])
        net(x).sum().backward() if any(pattern) else net(x)
        assert set(calls) == {block for block, b in enumerate(pattern) if b}


@pytest.mark.parametrize("activation", [None, nn.ReLU()])
@pytest.mark.parametrize("shortcut", [None, nn.AvgPool2d(2)])
def test_a_closed_block_is_activation_of_shortcut(
    activation: nn.Module | None, shortcut: nn.Module | None
) -> None:
    x = torch.randn(2, 3, 4, 4)
    out = sd.residual_step(x, MustNotRun(), shortcut, activation, Gate(open=False))
    expected = x if shortcut is None else shortcut(x)
    assert torch.equal(out, expected if activation is None else expected.clamp(min=0))


def test_the_residual_step_takes_plain_functions() -> None:
    x = torch.tensor([[1.0, -3.0]])
    gate = Gate(factor=torch.tensor(0.5))
    out = sd.residual_step(x, lambda h: 2 * h, lambda h: h + 1, torch.abs, gate)
    assert out.tolist() == [[3.0, 5.0]]


def test_a_closed_block_stores_nothing_for_the_backward_pass() -> None:
    def stored(forward) -> list[tuple]:
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t
        ):
            forward()
        return shapes

    unit = post_activation(3, 5).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    unit.gates = BlockGates(training=Gate(open=False))
    shortcut, activation = unit.shortcut, unit.activation
    assert shortcut is not None
    assert activation is not None
    closed = stored(lambda: unit(x))
    assert closed == stored(lambda: activation(shortcut(x)))
    unit.gates.training = Gate(open=True)
    assert len(stored(lambda: unit(x))) > len(closed)

    plain = pre_activation(3).double()
    plain.gates = BlockGates(training=Gate(open=False))
    assert stored(lambda: plain(x)) == []


@pytest.mark.parametrize("scale", ["inference", "training"])
def test_evaluation_is_the_closed_form(scale) -> None:
    net = six_blocks().eval()
    survival = tuple(1 - 0.1 * block for block in range(1, 7))
    for unit, gate in zip(net, evaluation_gates(survival, scale), strict=True):
        unit.gates = BlockGates(evaluation=gate)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = x
    for unit, p in zip(net, survival, strict=True):
        factor = p if scale == "inference" else 1.0
        shortcut = expected if unit.shortcut is None else unit.shortcut(expected)
        expected = shortcut + factor * unit.branch(expected)
        expected = expected if unit.activation is None else expected.clamp(min=0)
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)


def test_training_scale_divides_an_open_branch_by_its_probability() -> None:
    unit = pre_activation(3).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    (gate,) = training_gates(torch.tensor([True]), (0.8,), "batch", "training")
    unit.gates = BlockGates(training=gate)
    torch.testing.assert_close(unit(x), x + unit.branch(x) / 0.8, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", ["inference", "training"])
@pytest.mark.parametrize("kind", ["batch", "sample", "subset"])
def test_the_expectation_over_all_gate_patterns_is_the_evaluation_output(kind, scale) -> None:
    """Exactly, where branches are linear and nothing follows the addition."""
    torch.manual_seed(0)
    survival = (0.9, 0.7, 0.5, 0.2)
    net = nn.Sequential(*(sd.Residual(nn.Linear(3, 3, bias=False)) for _ in survival)).double()
    x = torch.randn(1, 3, dtype=torch.float64)
    expectation = torch.zeros(1, 3, dtype=torch.float64)
    for pattern in itertools.product((False, True), repeat=4):
        coins = torch.tensor(pattern) if kind == "batch" else torch.tensor(pattern)[:, None]
        set_gates(net, training_gates(coins, survival, kind, scale))
        chance = math.prod(p if b else 1 - p for b, p in zip(pattern, survival, strict=True))
        expectation += chance * net(x)
    set_gates(net, evaluation_gates(survival, scale))
    torch.testing.assert_close(expectation, net(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", ["inference", "training"])
def test_a_sample_gate_equals_a_loop_over_the_samples(scale) -> None:
    torch.manual_seed(0)
    unit = post_activation(3, 5).double()
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    coins = torch.tensor([[True, False, False, True, True, False]])
    (gate,) = training_gates(coins, (0.6,), "sample", scale)
    unit.gates = BlockGates(training=gate)
    out = unit(x)
    shortcut, f = F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 0, 2)), unit.branch(x)
    for sample, kept in enumerate(coins[0].tolist()):
        h = shortcut[sample]
        if kept:
            h = h + f[sample] / (0.6 if scale == "training" else 1.0)
        torch.testing.assert_close(out[sample], h.clamp(min=0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", ["inference", "training"])
def test_a_subset_gate_equals_the_sample_gate_where_samples_do_not_mix(scale) -> None:
    torch.manual_seed(0)
    branch = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 5))
    unit = sd.Residual(branch, shortcut=nn.Linear(4, 5), activation=nn.Tanh()).double()
    coins = torch.rand(8, 7) < 0.5
    coins[0] = True
    for row in coins:
        results = []
        for kind in ("sample", "subset"):
            (gate,) = training_gates(row[None], (0.5,), kind, scale)
            unit.gates = BlockGates(training=gate)
            x = torch.linspace(-2, 2, 28, dtype=torch.float64).view(7, 4).requires_grad_()
            unit.zero_grad()
            out = unit(x)
            (out * torch.arange(35).view(7, 5)).sum().backward()
            results.append([out, x.grad, *(p.grad for p in unit.parameters())])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_under_a_subset_gate_the_branch_sees_the_drawn_samples_only() -> None:
    seen: list[Tensor] = []
    x = torch.arange(10.0).view(5, 2)
    coins = torch.tensor([[False, True, False, True, True]])
    (gate,) = training_gates(coins, (0.5,), "subset", "inference")
    out = sd.residual_step(x, lambda h: seen.append(h) or 10 * h, gate=gate)
    assert [h.tolist() for h in seen] == [x[[1, 3, 4]].tolist()]
    assert torch.equal(out, x * torch.tensor([1, 11, 1, 11, 11])[:, None])


def test_an_empty_subset_runs_nothing() -> None:
    (gate,) = training_gates(torch.zeros(1, 5, dtype=torch.bool), (0.5,), "subset", "training")
    x = torch.randn(5, 2)
    assert torch.equal(sd.residual_step(x, MustNotRun(), gate=gate), x)


@pytest.mark.parametrize("shortcut", [None, nn.Identity(), nn.Sequential(), nn.Flatten(1)])
@pytest.mark.parametrize("is_open", [False, True])
def test_an_activation_in_place_leaves_the_input_as_it_was(shortcut, is_open: bool) -> None:
    torch.manual_seed(0)
    unit = sd.Residual(nn.Linear(4, 4), shortcut, nn.ReLU(inplace=True))
    unit.gates = BlockGates(training=Gate(open=is_open))
    leaf = torch.randn(3, 4, requires_grad=True)
    x = leaf.sigmoid() - 0.5
    before = x.detach().clone()
    out = unit(x)
    assert torch.equal(x, before)
    (out * x.square()).sum().backward()

    plain = leaf.detach().clone().requires_grad_()
    y = plain.sigmoid() - 0.5
    h = y + F.linear(y, unit.branch.weight, unit.branch.bias) if is_open else y
    (h.clamp(min=0) * y.square()).sum().backward()
    torch.testing.assert_close(leaf.grad, plain.grad)


@pytest.mark.parametrize("without_branch", [False, True])
@pytest.mark.parametrize("replaced", [False, True])
def test_an_activation_may_be_given_its_inplace_later(without_branch: bool, replaced: bool) -> None:
    unit = sd.Residual(nn.Linear(4, 4), activation=nn.ReLU())
    unit.gates = BlockGates(training=CLOSED)
    closed = ShortcutOnly(unit) if without_branch else unit
    if replaced:
        closed.activation = nn.Sequential(nn.ReLU(inplace=True))
    else:
        unit.activation.inplace = True
    x = torch.randn(3, 4)
    before = x.clone()
    assert torch.equal(closed(x), before.relu())
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", ["batch", "sample", "subset"])
@pytest.mark.parametrize("scale", ["inference", "training"])
def test_all_gates_work_under_autocast(kind, scale) -> None:
    torch.manual_seed(0)
    unit = sd.Residual(nn.Conv2d(3, 3, 3, padding=1), activation=nn.ReLU())
    x = torch.randn(4, 3, 8, 8)
    coins = torch.tensor([True]) if kind == "batch" else torch.tensor([[True, False, True, True]])
    (gate,) = training_gates(coins, (0.5,), kind, scale)
    unit.gates = BlockGates(training=gate)
    with torch.no_grad():
        expected = unit(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = unit(x)
    out.float().sum().backward()
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
    assert unit.branch.weight.grad is not None
    assert unit.branch.weight.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["sample", "subset"])
@pytest.mark.parametrize("samples", [1, 4, 6, 10])
@pytest.mark.parametrize("kept", [0, 2, 5])
def test_gates_drawn_for_another_batch_size_are_an_error(kind, samples: int, kept: int) -> None:
    coins = torch.arange(5)[None] < kept
    (gate,) = training_gates(coins, (0.5,), kind, "inference")
    with pytest.raises(
        sd.errors.GateError, match=rf"got {samples} samples.* drawn for 5.*gate=\"batch\""
    ):
        sd.residual_step(torch.randn(samples, 3), nn.Identity(), gate=gate)


def test_a_unit_of_no_applied_model_is_a_plain_residual_unit() -> None:
    unit = sd.Residual(nn.Linear(3, 3), nn.Linear(3, 3), nn.ReLU())
    x = torch.randn(2, 3)
    assert unit.shortcut is not None
    for training in (True, False):
        expected = (unit.shortcut(x) + unit.branch(x)).clamp(min=0)
        assert torch.equal(unit.train(training)(x), expected)


def test_parameters_are_found_under_the_names_of_the_parts() -> None:
    unit = sd.Residual(nn.Linear(3, 3), nn.Linear(3, 3), nn.PReLU())
    assert list(unit.state_dict()) == [
        "branch.weight",
        "branch.bias",
        "shortcut.weight",
        "shortcut.bias",
        "activation.weight",
    ]


class Recomputing(torch.autograd.Function):
    """Calls `forward` without a graph, and `again` in its backward pass."""

    @staticmethod
    def forward(ctx, x, forward, again):
        ctx.save_for_backward(x)
        ctx.again = again
        return forward(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            out = ctx.again(x)
        out.backward(gradient)
        return x.grad, None, None


class Recomputed(nn.Module):
    def __init__(self, width, knows_gates):
        super().__init__()
        self.unit = sd.Residual(nn.Sequential(nn.Linear(width, width), nn.Tanh()))
        self.knows_gates = knows_gates

    def forward(self, x):
        again = self.unit if self.knows_gates else lambda x: x + self.unit.branch(x)
        return Recomputing.apply(x, self.unit, again)


@pytest.mark.parametrize("copied", [False, True])
def test_a_branch_is_not_called_in_the_backward_pass_of_a_function(copied):
    model = nn.Sequential(*(Recomputed(4, knows_gates=False) for _ in range(3)))
    handle = sd.apply(model, sd.Uniform(0.5))
    x = torch.randn(2, 4, requires_grad=True)
    model(x)
    if copied:
        model = copy.deepcopy(model)
    for pattern in ([True] * 3, [False, True, False]):
        with (
            handle.forced(pattern),
            pytest.raises(sd.errors.GateError, match="call the unit instead"),
        ):
            model(x).sum().backward()
    sd.remove(model)
    model(x).sum().backward()


@pytest.mark.parametrize("pattern", [*itertools.product((False, True), repeat=3)])
def test_a_function_that_calls_the_unit_again_is_exact(pattern):
    model = nn.Sequential(*(Recomputed(4, knows_gates=True) for _ in range(3))).double()
    plain = nn.Sequential(*(copy.deepcopy(part.unit) for part in model))
    gradients = []
    for each in (model, plain):
        handle = sd.apply(each, sd.Uniform(0.5))
        x = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
        with handle.forced(pattern):
            each(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in each.parameters())])
    for mine, theirs in zip(*gradients, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("branch", lambda x: 2 * x),
        ("branch", None),
        ("branch", nn.Linear),
        ("shortcut", torch.detach),
        ("activation", torch.relu),
    ],
)
def test_what_is_no_module_is_no_part_of_a_unit(name, given):
    with pytest.raises(TypeError, match=rf"sd\.Residual\({name}=.*must be an nn\.Module"):
        sd.Residual(**{"branch": nn.Linear(4, 4), name: given})


class OneChannel(nn.Module):
    def forward(self, x):
        return x[:, :1]


class OneSample(nn.Module):
    def forward(self, x):
        return x[:1]


@pytest.mark.parametrize(("shortcut", "shape"), [(OneChannel, "[2, 1]"), (OneSample, "[1, 4]")])
def test_a_sum_that_has_not_the_shape_of_its_shortcut_is_refused_when_it_is_made(shortcut, shape):
    unit = sd.Residual(nn.Linear(4, 4), shortcut())
    model, x = nn.Sequential(unit), torch.randn(2, 4)
    handle = sd.apply(model)
    for run in (lambda: unit.branch and model(x), lambda: sd.residual_step(x, *unit.children())):
        with (
            handle.forced([True]),
            pytest.raises(sd.errors.UnsupportedBlockError) as error,
        ):
            run()
        assert "has the shape [2, 4], and the shortcut" in str(error.value)
        assert f"which a closed gate returns, {shape}" in str(error.value)


TRACERS = {
    "torch.fx": torch.fx.symbolic_trace,
    "torch.jit": lambda unit: torch.jit.trace(unit, torch.randn(2, 4)),
    "torch.export": lambda unit: torch.export.export(unit, (torch.randn(2, 4),)).module(),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("tracer", TRACERS)
def test_a_unit_is_traced_as_a_plain_sum(tracer):
    unit = sd.Residual(nn.Linear(4, 4), activation=nn.ReLU())
    traced, x = TRACERS[tracer](unit), torch.randn(2, 4)
    torch.testing.assert_close(traced(x), unit(x))
