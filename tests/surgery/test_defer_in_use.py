"""Deferred blocks under checkpointing, compilers and many processes: a home-made transformer."""

import copy
import functools
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd
from stochastic_depth.surgery.applied import applied_to
from support.deferred_loop import CHECKS, Transformer, example, gradients, surviving
from support.ranks import run_checks

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # torch's own
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
]


def applied(**options):
    model = Transformer()
    return model, sd.apply(model, sd.Uniform(0.5), example=example(), **options)


class Recomputed(Transformer):
    """Each branch, or each whole layer, is computed again in the backward pass."""

    def __init__(self, reentrant: bool, whole: bool) -> None:
        super().__init__()
        self.again = functools.partial(checkpoint, use_reentrant=reentrant)
        self.whole = whole

    def forward(self, x):
        x = self.stem(x)
        for attention, feed_forward in self.layers:
            if self.whole:
                x = self.again(self.layer, attention, feed_forward, x)
            else:
                x = self.again(attention, x) + x
                x = self.again(feed_forward, x) + x
        return self.head(x)

    @staticmethod
    def layer(attention, feed_forward, x):
        x = attention(x) + x
        return feed_forward(x) + x


@pytest.mark.parametrize(("reentrant", "whole"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("skipped", ["paper", "freeze"])
def test_recomputed_branches_have_the_gates_and_gradients_of_their_pass(reentrant, whole, skipped):
    model = Recomputed(reentrant, whole)
    handle = sd.apply(model, sd.Uniform(0.5), example=example(), skipped=skipped)
    assert {found.mechanism for found in applied_to(model).found} == {"deferred"}
    for step in range(6):
        model.zero_grad()
        out = model(example(step))
        expected = surviving(model, example(step), handle.gates)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        out.square().sum().backward()
        mine = gradients(model)
        model.zero_grad()
        expected.square().sum().backward()
        for (name, true), found in zip(gradients(model).items(), mine.values(), strict=True):
            if true is None:
                assert found is None if skipped == "freeze" else not found.any(), name
            else:
                torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-12)


def test_additions_within_a_reentrant_checkpoint_are_refused():
    model = Recomputed(reentrant=True, whole=True)
    with pytest.raises(sd.errors.StochasticDepthError, match="checkpoint only the branch"):
        sd.apply(model, sd.Uniform(0.5), example=example())
    assert type(model) is Recomputed


@pytest.mark.parametrize("options", [{"scale": "training"}, {"gate": "sample"}])
def test_an_addition_that_would_be_computed_again_without_its_gate_is_refused(options):
    model = Recomputed(reentrant=False, whole=True)
    with pytest.raises(sd.errors.UnsupportedBlockError, match="checkpoint only the branch"):
        sd.apply(model, sd.Uniform(0.5), example=example(), **options)


def test_an_addition_that_moves_into_a_checkpoint_later_is_an_error():
    model = Recomputed(reentrant=False, whole=False)
    handle = sd.apply(model, sd.Uniform(0.5), example=example(), scale="training")
    model.whole = True
    with (
        handle.forced([True] * 3),
        pytest.raises(sd.errors.AdditionNotReachedError, match="took a different path") as error,
    ):
        model(example())
    assert error.value.block in {block.name for block in handle.blocks}


class OtherPath(nn.Module):
    """Runs other blocks for large mini-batches than for small ones."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = (
            nn.ModuleList(nn.Linear(4, 4) for _ in range(3)) for _ in range(2)
        )

    def forward(self, x):
        for small, large in zip(self.small, self.large, strict=True):
            x = x + large(x) if len(x) > 4 else x + small(x)
        return x


def test_blocks_that_do_not_run_in_training_are_warned_of():
    model = OtherPath()
    handle = sd.apply(model, sd.Uniform(0.5), example=torch.randn(3, 4))
    assert [block.name for block in handle.blocks] == ["small.0", "small.1", "small.2"]
    with handle.forced([False, True, True]):
        model(torch.randn(3, 4))
        with pytest.warns(
            sd.errors.BypassedAdditionWarning,
            match=r"'small\.0'.*different path.*nothing on that path",
        ):
            model(torch.randn(8, 4))
    model.eval()(torch.randn(8, 4))


def test_two_passes_before_their_backward_passes_keep_their_own_gates():
    model = Recomputed(reentrant=False, whole=True)
    handle = sd.apply(model, sd.Uniform(0.5), example=example())
    losses, right = [], []
    for step in range(2):
        losses.append(model(example(step)).square().sum())
        right.append(surviving(model, example(step), handle.gates).square().sum())
    sum(losses).backward()
    mine = gradients(model)
    model.zero_grad()
    sum(right).backward()
    for name, true in gradients(model).items():
        expected = torch.zeros_like(mine[name]) if true is None else true
        torch.testing.assert_close(mine[name], expected, rtol=1e-10, atol=1e-12)


def test_three_hundred_patterns_compile_nothing_beyond_the_first():
    model, handle = applied()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    sd.compile_blocks(model, backend=backend)
    blocks = len(handle.blocks)
    with handle.forced([True] * blocks):
        model(example()).sum().backward()
    first, source = len(graphs), torch.Generator().manual_seed(0)
    assert first
    for _ in range(300):
        pattern = torch.rand(blocks, generator=source) < 0.5
        with handle.forced(pattern):
            out = model(example())
        torch.testing.assert_close(out, surviving(model, example(), pattern))
    assert len(graphs) == first


def test_copies_and_pickles_draw_the_same_gates_and_are_models_of_their_own():
    model, handle = applied()
    model(example()).sum().backward()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        own = applied_to(twin).handle
        assert own is not handle
        assert own.state_dict() == handle.state_dict()
        before = handle.step
        out = twin(example(1))
        assert handle.step == before
        torch.testing.assert_close(out, surviving(twin, example(1), own.gates))


def test_what_is_folded_cut_or_taken_off_computes_what_the_handle_said():
    model, handle = applied()
    x, pattern = example(1), [True, False, True]
    whole = copy.deepcopy(model).eval()(x)
    with handle.subnetwork(pattern, scaled=True):
        of_two = model.eval()(x)
    shorter, folded = copy.deepcopy(model), copy.deepcopy(model)
    sd.truncate(shorter, [0, 2], x)
    assert len(shorter.layers) == 2
    torch.testing.assert_close(shorter.eval()(x), of_two, rtol=1e-10, atol=1e-12)
    sd.fold(folded, x)
    torch.testing.assert_close(folded.eval()(x), whole, rtol=1e-10, atol=1e-12)
    sd.remove(model)
    assert type(model) is Transformer
    full = surviving(model, x, [True] * 3)
    torch.testing.assert_close(model.train()(x), full, rtol=1e-12, atol=1e-12)


def test_other_blocks_may_be_deferred_after_a_plan_and_after_a_removal():
    model = Trunk()
    assert len(sd.plan(model, X).blocks) == 3
    for left_out in range(3):
        handle = sd.apply(model, sd.Uniform(0.5), example=X, exclude=[f"layers.{left_out}"])
        with handle.forced([False, False]):
            assert torch.equal(model(X), X + model.layers[left_out](X))
        sd.remove(model)


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Adapted(nn.Module):
    def __init__(self, base) -> None:
        super().__init__()
        self.base, self.more = base, nn.Linear(4, 4)

    def forward(self, x):
        return self.base(x) + self.more(x)


CHANGES = {
    "replaced": lambda layer: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)),
    "adapted": Adapted,
    "checkpointed": checkpoint_wrapper,
    "compiled": functools.partial(torch.compile, backend="eager"),
}


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_stands_in_the_place_of_a_branch_has_its_gate(change, early):
    model = Trunk()
    handle = sd.apply(model, sd.Uniform(0.5), example=X)
    if not early:
        model(X).sum().backward()
    layer = model.layers[1] = change(model.layers[1])
    called = []
    layer.register_forward_hook(lambda *_: called.append(1))
    model.zero_grad()
    for gates in ([True, False, True], [False, True, False]):
        called.clear()
        with handle.forced(gates):
            out = model.train()(X)
        assert len(called) == gates[1]
        expected = X
        for each, gate in zip(model.layers, gates, strict=True):
            expected = expected + gate * each(expected)
        torch.testing.assert_close(out, expected)
        out.sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    expected = X
    for each in model.layers:
        expected = expected + 0.5 * each(expected)
    torch.testing.assert_close(model.eval()(X), expected)
    sd.remove(model)
    assert model.layers[1] is layer


def test_layers_may_be_taken_off_a_trunk():
    model = Trunk()
    handle = sd.apply(model, sd.Uniform(0.5), example=X)
    del model.layers[1:]
    with handle.forced([False] * 3):
        assert torch.equal(model.train()(X), X)
    sd.remove(model)


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    return run_checks("deferred_loop", tmp_path_factory.mktemp("deferred"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS["two"]])
def test_on_two_ranks(check, failures):
    assert failures["two", check] == ""


class Keeps(nn.Module):
    """Keeps what its branch computes, as attention keeps its weights for a picture of them."""

    def __init__(self):
        super().__init__()
        self.f, self.last = nn.Linear(6, 6, dtype=torch.float64), None

    def forward(self, x):
        y = self.f(x)
        self.last = y.detach()
        return x + y.tanh()


def keeping():
    plain = nn.Sequential(Keeps(), Keeps())
    model, x = copy.deepcopy(plain), torch.randn(5, 6, dtype=torch.float64)
    handle = sd.apply(model, example=x)
    assert {found.mechanism for found in applied_to(model).found} == {"deferred"}
    return plain, model.train(), handle, x


def test_what_a_closed_branch_keeps_is_that_of_its_pass():
    plain, model, handle, x = keeping()
    with handle.forced([False, False]):
        assert torch.equal(model(x), x)
    for block, original in zip(model, plain, strict=True):
        original(x)
        torch.testing.assert_close(2 * block.last, 2 * original.last)


def test_what_a_closed_branch_keeps_is_not_computed_with_the_weights_of_a_later_step():
    _, model, handle, x = keeping()
    with handle.forced([False, False]):
        model(x)
    with torch.no_grad():
        model[0].f.weight.mul_(2)  # as an optimizer does
    with pytest.raises(sd.errors.GateError, match=r"Linear in a closed branch .* optimizer\.step"):
        model[0].last.sum()
    torch.testing.assert_close(2 * model[1].last, 2 * model[1].f(x))


class Averages(Keeps):
    def forward(self, x):
        y = self.f(x)
        self.last = y.detach() if self.last is None else 0.9 * self.last + 0.1 * y.detach()
        return x + y.tanh()


def test_a_running_mean_of_a_branch_needs_every_pass_and_is_refused():
    x = torch.randn(5, 6, dtype=torch.float64)
    with pytest.raises(sd.errors.UnsupportedBlockError, match="uses its output for more"):
        sd.apply(nn.Sequential(Averages(), Averages()), example=x)


def halved(y):
    y.mul_(0.5)
    return y


def without_first(y):
    y[:, 0] = 0
    return y


def into_half(y):
    return torch.mul(y, 0.5, out=torch.empty_like(y)) if not torch.is_grad_enabled() else y * 0.5


def rectified_half(y):
    half = y[:, :3]
    half.clamp_(min=0)
    return y


def turned_and_back(y):
    y.unsqueeze_(1)
    batch, _, width = y.shape
    y = y.add_(1).view(batch, width)
    y.t_()
    assert y.shape == (width, batch)
    y.transpose_(0, 1)
    return y.view(*y.shape)


def swapped(y):
    y[:, [0, 1]] = y[:, [1, 0]]
    y[y > 0] = 0.5
    first = y[:, :1] * 1
    y[:, :1] = 0
    return torch.cat([y[:, 1:], first], 1)


class ChangesInLoop(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change
        self.branches = nn.ModuleList(nn.Linear(6, 6, dtype=torch.float64) for _ in range(3))

    def forward(self, x):
        for branch in self.branches:
            y = self.change(branch(x))
            x = x + y
        return x


@pytest.mark.parametrize(
    "change", [halved, without_first, into_half, rectified_half, turned_and_back, swapped]
)
@pytest.mark.parametrize("options", [{}, {"drop_rate": 0.5}, {"gate": "sample"}])
def test_a_branch_that_the_loop_changes_in_place_is_right_under_all_gates(change, options):
    torch.manual_seed(0)
    model = ChangesInLoop(change)
    x = torch.randn(5, 6, dtype=torch.float64)
    handle = sd.apply(model, example=x, **options)
    factors = [1 / p if "drop_rate" in options else 1 for p in handle.survival]
    for gates in itertools.product((True, False), repeat=3):
        with handle.forced(gates):
            found = model(x)
        expected = x
        for branch, is_open, factor in zip(model.branches, gates, factors, strict=True):
            if is_open:
                expected = expected + factor * change(branch(expected).clone())
        torch.testing.assert_close(found, expected)
        if any(gates):
            parameters = list(model.parameters())
            grads = [
                torch.autograd.grad(
                    out.square().sum(), parameters, allow_unused=True, materialize_grads=True
                )
                for out in (found, expected)
            ]
            torch.testing.assert_close(*grads)


class MeanInTraining(nn.Module):
    """Keeps a running mean of its branch, in training mode only."""

    def __init__(self):
        super().__init__()
        self.f, self.g = (nn.Linear(6, 6, dtype=torch.float64) for _ in range(2))
        self.register_buffer("mean", torch.zeros(6, dtype=torch.float64))

    def forward(self, x):
        y = self.f(x).tanh()
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        return x + self.g(y - self.mean)


class GivesLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(6, 6, dtype=torch.float64)

    def forward(self, x):
        y = self.f(x).tanh()
        return x + y, y.square().mean()


class SumsLosses(nn.Module):
    """Sums what its blocks return beside their outputs, in training mode only."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(GivesLoss() for _ in range(3))

    def forward(self, x):
        total = 0.0
        for block in self.blocks:
            x, loss = block(x)
            if self.training:
                total = total + loss
        return (x, total) if self.training else x


def test_what_training_alone_needs_of_a_branch_is_named():
    x = torch.randn(5, 6, dtype=torch.float64)
    with pytest.raises(sd.errors.UnsupportedBlockError, match=r"'blocks\.0'.*in training mode"):
        sd.apply(SumsLosses(), example=x)
    with pytest.raises(sd.errors.UnsupportedBlockError, match=r"'0'.*in training mode"):
        sd.apply(nn.Sequential(MeanInTraining(), MeanInTraining()), example=x)


class WeightNormed(nn.Module):
    """As in a vocoder."""

    def __init__(self):
        super().__init__()
        self.f, self.g = (nn.utils.weight_norm(nn.Linear(6, 6)) for _ in range(2))

    def forward(self, x):
        return x + self.g(self.f(x).tanh())


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_weight_norm_of_the_old_kind_is_skipped():
    model, x = nn.Sequential(nn.Linear(6, 6), WeightNormed(), WeightNormed()), torch.randn(5, 6)
    handle = sd.apply(model, example=x)
    with handle.forced([False, True]):
        found = model(x)
    h = model[0](x)
    torch.testing.assert_close(found, h + model[2].g(model[2].f(h).tanh()))
    found.sum().backward()
    assert model[2].f.weight_g.grad.abs().sum() > 0


class AddsInMethod(nn.Module):
    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(6, 6, dtype=torch.float64) for _ in range(3))
        self.head = nn.Linear(6, 2, dtype=torch.float64)

    def features(self, x):
        for branch in self.branches:
            x = x + branch(x).tanh()
        return x

    def forward(self, x):
        return self.head(self.features(x))


def test_a_method_that_adds_is_under_the_gates_when_it_is_called_by_itself():
    torch.manual_seed(0)
    model, x = AddsInMethod(), torch.randn(5, 6, dtype=torch.float64)
    handle = sd.apply(model, example=x)
    torch.testing.assert_close(model.head(model.eval().features(x)), model(x))
    scaled = x
    for branch, p in zip(model.branches, handle.survival, strict=True):
        scaled = scaled + p * branch(scaled).tanh()
    torch.testing.assert_close(model.features(x), scaled)
    with handle.subnetwork([False] * 3):
        assert torch.equal(model.features(x), x)
    model.train()
    with pytest.raises(sd.errors.GateError, match=r"with handle\.draw\(\)"):
        model.features(x)
    for _ in range(8):
        with handle.draw():
            found = model.features(x)
        expected = x
        for branch, is_open in zip(model.branches, handle.gates.tolist(), strict=True):
            expected = expected + branch(expected).tanh() if is_open else expected
        torch.testing.assert_close(found, expected)
        model(x).sum().backward()


def mixed(kind: str, h: torch.Tensor, before: list[torch.Tensor]) -> torch.Tensor:
    """The output `h` of a branch with what earlier branches have computed, on long inputs only."""
    if not before or h.shape[1] <= 6:
        return h
    if kind == "last":
        return h + before[-1] * 0.1
    if kind == "product":
        return h * before[-1].sigmoid()
    return h + torch.stack(before).mean(0)


class ReadsEarlierBranches(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before: list[torch.Tensor] = []
        for layer in self.layers:
            h = mixed(self.kind, layer(x).tanh(), before)
            before.append(h)
            x = x + h
        return x

    def surviving(self, x: torch.Tensor, gates: tuple[bool, ...]) -> torch.Tensor:
        before: list[torch.Tensor] = []
        for layer, is_open in zip(self.layers, gates, strict=True):
            h = mixed(self.kind, layer(x).tanh(), before)
            before.append(h)
            x = x + h if is_open else x
        return x


class Reads(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.f = kind, nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, before: list[torch.Tensor]) -> torch.Tensor:
        h = mixed(self.kind, self.f(x).tanh(), before)
        before.append(h)
        return x + h


class BlocksReadEarlierBranches(ReadsEarlierBranches):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.blocks = nn.ModuleList(Reads(kind) for _ in range(3))
        self.layers = nn.ModuleList(block.f for block in self.blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before: list[torch.Tensor] = []
        for block in self.blocks:
            x = block(x, before)
        return x


@pytest.mark.parametrize("kind", ["last", "product", "all"])
@pytest.mark.parametrize("network", [ReadsEarlierBranches, BlocksReadEarlierBranches])
def test_an_open_branch_that_reads_a_closed_one_is_added(network, kind):
    model = network(kind).double()
    handle = sd.apply(model, example=torch.randn(2, 5, 8, dtype=torch.float64))
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    for gates in itertools.product([False, True], repeat=3):
        with handle.forced(list(gates)):
            torch.testing.assert_close(model(x), model.surviving(x, gates))


class Chunks(nn.Module):
    """Adds in a loop over parts of the input; the branches of a part may all run before it."""

    def __init__(self, first_all: bool) -> None:
        super().__init__()
        self.first_all, self.f, self.g = first_all, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.split(4, 1)
        if self.first_all:
            branches = [self.g(self.f(part).tanh()) for part in parts]
            return torch.cat([a + b for a, b in zip(parts, branches, strict=True)], 1)
        return torch.cat([part + self.g(self.f(part).tanh()) for part in parts], 1)


@pytest.mark.parametrize("gate", ["batch", "subset"])
@pytest.mark.parametrize("first_all", [False, True])
def test_a_loop_that_is_longer_than_on_the_example_adds_under_the_one_gate(first_all, gate):
    model = nn.Sequential(Chunks(first_all), Chunks(first_all)).double()
    x = torch.randn(4, 12, 8, dtype=torch.float64)
    handle = sd.apply(model, sd.Uniform(0.5), example=x[:, :4], gate=gate)
    assert {found.mechanism for found in applied_to(model).found} == {"deferred"}
    for _ in range(4):
        out, expected = model(x), x
        for weight, block in zip(handle.gates.double(), model, strict=True):
            expected = expected + weight.view(-1, 1, 1) * block.g(block.f(expected).tanh())
        torch.testing.assert_close(out, expected)
    with handle.forced([False, False]):
        assert torch.equal(model(x), x)
    expected = x
    for block in model:
        expected = expected + 0.5 * block.g(block.f(expected).tanh())
    torch.testing.assert_close(model.eval()(x), expected)


class SharedWithStem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.head = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, stem: bool = True, depth: int = 3) -> torch.Tensor:
        if stem:
            x = self.f(x)
        for _ in range(depth):
            x = x + self.f(x)
        return self.head(x)


@pytest.mark.parametrize("fewer", [{"stem": False}, {"depth": 2}])
def test_calls_that_are_counted_are_not_fewer_than_on_the_example(fewer):
    x = torch.randn(2, 8)
    model = SharedWithStem()
    handle = sd.apply(model, example=x)
    for mode in (True, False):
        with (
            handle.forced([False] * 3),
            pytest.raises(sd.errors.GateError, match=r"'f' is called less often .* \(4 times\)"),
        ):
            model.train(mode)(x, **fewer)
    without = SharedWithStem()
    handle = sd.apply(without, example={"x": x, "stem": False})
    with handle.forced([False] * 3):
        assert torch.equal(without.eval()(x, stem=False, depth=2), without.head(x))


class Fuses(nn.Module):
    """Takes a list to which the trunk appends later."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, values: list[torch.Tensor]) -> torch.Tensor:
        return self.f(torch.stack(values).sum(0))


class SharesItsActivation(nn.Module):
    """One branch holds the module that activates the other one, too."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.last = nn.PReLU(), nn.Linear(8, 8)
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.Sequential(nn.Linear(8, 8), self.act), nn.Linear(8, 8)])
            for _ in range(1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for first, second in self.layers:
            x = x + first(x)
            x = x + self.act(second(x))
        return self.last(x)


def test_a_module_inside_of_a_closed_branch_may_be_called_less_often():
    x = torch.randn(2, 8)
    model = SharesItsActivation()
    handle = sd.apply(model, example=x, granularity="unit")
    for gates in itertools.product([False, True], repeat=len(handle.blocks)):
        with handle.forced(list(gates)):
            out, expected = model(x), x
        for first, second in model.layers:
            expected = expected + first(expected) if gates[0] else expected
            expected = expected + model.act(second(expected)) if gates[1] else expected
        torch.testing.assert_close(out, model.last(expected))


class ChangesWhatItGave(nn.Module):
    """Returns the outputs of its branches if asked; then it changes what they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Fuses() for _ in range(2))

    def forward(self, x: torch.Tensor, keep: bool = False) -> tuple[torch.Tensor, ...]:
        values, kept = [x], []
        for layer in self.layers:
            h = layer(values)
            x = x + h
            values.append(x)
            kept.append(h)
        out = x.clone()
        if keep and x.is_inference():
            x.mul_(2)
        return (out, *kept) if keep else (out,)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_a_closed_branch_was_given_may_change_before_its_output_is_read(mode):
    x = torch.randn(3, 8)
    model = ChangesWhatItGave()
    handle = sd.apply(model, example=x)
    assert {found.mechanism for found in applied_to(model).found} == {"deferred"}
    with mode(), handle.forced([False, False]):
        out, first, second = model.eval()(x.clone(), keep=True)
        torch.testing.assert_close(out, x)
        torch.testing.assert_close(first, model.layers[0].f(x))
        torch.testing.assert_close(second, model.layers[1].f(2 * x))
