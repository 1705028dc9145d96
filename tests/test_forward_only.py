"""`closed="forward-only"`: a closed branch is added, and only its backward pass is saved."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Body(nn.Module):
    """Its branch, and how the branch is added: by `join`, which also works where it is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.drop, self.second = nn.Dropout(0.4), nn.Linear(8, 8)

    def f(self, x: Tensor) -> Tensor:
        return self.second(self.drop(torch.relu(self.norm(self.first(x)))))

    def join(self, x: Tensor, out: Tensor) -> Tensor:
        return x + out


class InExpression(Body):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class InStatements(Body):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = torch.relu(self.norm(h))
        h = self.second(self.drop(h))
        x = x + h
        return F.gelu(x)

    def join(self, x: Tensor, out: Tensor) -> Tensor:
        return F.gelu(x + out)


class InPlace(Body):
    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y += self.f(x)
        return y


def add(x: Tensor, out: Tensor) -> Tensor:
    return x + out


class InFunction(Body):
    def forward(self, x: Tensor) -> Tensor:
        return add(x, self.f(x))


class Adds(nn.Module):
    def forward(self, out: Tensor, x: Tensor) -> Tensor:
        return out + x


class InChild(Body):
    """Made skippable by a cut at the call of the module that adds."""

    def __init__(self) -> None:
        super().__init__()
        self.adds = Adds()

    def forward(self, x: Tensor) -> Tensor:
        return self.adds(self.f(x), x)


namespace: dict = {"Body": Body, "torch": torch}
exec("class NoSource(Body):\n    def forward(self, x):\n        return x + self.f(x)\n", namespace)
NoSource = namespace["NoSource"]
"""Without source it is skipped as a whole."""


class InResidual(Body):
    """Its f is put into an `sd.Residual` by `network`."""

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


KINDS = [InExpression, InStatements, InPlace, InFunction, InChild, NoSource, InResidual]


def network(kind: type[Body], blocks: int = 4, recompute: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    units = [kind() for _ in range(blocks)]
    if kind is InResidual:
        units = [sd.Residual(unit) for unit in units]
    if recompute:
        units = [Recomputed(unit) for unit in units]
    return nn.Sequential(nn.Linear(8, 8), *units).double()


class Recomputed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def by_hand(model: nn.Sequential, gates: list[bool], x: Tensor) -> Tensor:
    """The original network in training mode, the outputs of closed branches detached."""
    h = model[0](x)
    for unit, is_open in zip(list(model)[1:], gates, strict=True):
        body = unit.branch if isinstance(unit, sd.Residual) else unit
        out = body.f(h)
        h = body.join(h, out if is_open else out.detach())
    return h


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skipped", ["paper", "freeze"])
def test_gradients_are_those_of_the_original_with_closed_branches_detached(kind, skipped):
    original, model = network(kind), network(kind)
    handle = sd.apply(
        model, sd.Uniform(0.5), example=X, closed="forward-only", skipped=skipped, seed=1
    )
    both = set()
    for step in range(6):
        model.zero_grad()
        original.zero_grad()
        torch.manual_seed(step)
        out = model(X)
        gates = handle.gates.tolist()
        torch.manual_seed(step)
        expected = by_hand(original, gates, X)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        out.square().sum().backward()
        expected.square().sum().backward()
        mine = gradients(model)
        for name, true in gradients(original).items():
            if true is None and skipped == "paper":
                assert torch.equal(mine[name], torch.zeros_like(mine[name])), name
            elif true is None:
                assert mine[name] is None, name
            else:
                torch.testing.assert_close(mine[name], true, rtol=1e-10, atol=1e-12)
        both |= set(gates)
    assert both == {True, False}
    for mine, true in zip(model.buffers(), original.buffers(), strict=True):
        torch.testing.assert_close(mine, true)  # BatchNorm has seen every batch


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_the_original_and_nothing_is_multiplied(kind):
    original, model = network(kind).eval(), network(kind)
    handle = sd.apply(model, sd.Uniform(0.3), example=X, closed="forward-only")
    assert handle.scale == "none"
    torch.testing.assert_close(model.eval()(X), original(X), rtol=0, atol=0)


def test_all_blocks_closed_keep_no_activations_for_backward():
    def kept(model: nn.Module) -> int:
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = model(torch.randn(50, 8, dtype=torch.float64))
        assert out.requires_grad
        return sum(sizes.values())

    plain, model = network(InResidual), network(InResidual)
    handle = sd.apply(model, closed="forward-only")
    with handle.forced([False] * 4):
        assert kept(model) < kept(plain) / 8


def test_a_closed_branch_runs_without_a_graph():
    model = network(InResidual)
    handle = sd.apply(model, closed="forward-only")
    seen = []
    for unit in list(model)[1:]:
        unit.branch.register_forward_hook(lambda m, a, out: seen.append(out.requires_grad))
    with handle.forced([False] * 4):
        model(X).sum().backward()
    assert seen == [False] * 4


@pytest.mark.parametrize("kind", [InExpression, InStatements, NoSource, InResidual])
def test_checkpointing_gives_the_same_gradients(kind):
    plain, model = network(kind), network(kind, recompute=True)
    options = {"closed": "forward-only", "seed": 3}
    example = None if kind is InResidual else X
    for m in (plain, model):
        sd.apply(m, sd.Uniform(0.5), example=example, **options)
    for step in range(5):
        for m in (plain, model):
            m.zero_grad()
            torch.manual_seed(step)
            m(X).square().sum().backward()
        for mine, true in zip(gradients(model).values(), gradients(plain).values(), strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)


def test_a_schedule_down_to_0_runs_every_branch_forward():
    model = network(InResidual)
    plain = copy.deepcopy(model)
    sd.apply(model, lambda block, blocks, step: 0.0, closed="forward-only")
    torch.manual_seed(0)
    out = model(X)
    torch.manual_seed(0)
    torch.testing.assert_close(out, plain(X))


def test_summary_counts_the_forward_pass_of_a_closed_branch():
    costs = []
    for closed in ("skipped", "forward-only"):
        model = network(InResidual)
        sd.apply(model, sd.Uniform(0.25), closed=closed)
        summary = sd.summary(model, X)
        full = summary.forward + summary.backward
        costs.append(summary.expected_saving)
        backward = sum(block.backward for block in summary.blocks)
        forward = sum(block.forward for block in summary.blocks)
        saved = backward + (forward if closed == "skipped" else 0)
        assert summary.expected_saving == pytest.approx(0.75 * saved / full)
    assert costs[1] < costs[0]


def test_what_does_not_go_with_it_is_named():
    with pytest.raises(sd.errors.ApplyError, match=r'needs gate="batch", this is gate="subset"'):
        sd.apply(network(InResidual), closed="forward-only", gate="subset")
    with pytest.raises(sd.errors.ApplyError, match=r"there is no expectation to correct"):
        sd.apply(network(InResidual), closed="forward-only", scale="training")
    with pytest.raises(sd.errors.ApplyError, match=r"closed='forward': choose one of 'skipped'"):
        sd.apply(network(InResidual), closed="forward")


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("kind", [InExpression, InResidual])
@pytest.mark.parametrize("skipped", ["paper", "freeze"])
def test_ddp_does_not_wait_for_branches_that_run_forward_only(kind, skipped):
    plain, model = network(kind), network(kind)
    options = {"example": X, "closed": "forward-only", "skipped": skipped, "seed": 1}
    for m in (plain, model):
        sd.apply(m, sd.Uniform(0.5), **options)
    wrapped = DistributedDataParallel(model)
    for step in range(5):
        for m, call in ((plain, plain), (model, wrapped)):
            m.zero_grad()
            torch.manual_seed(step)
            call(X).square().sum().backward()
        mine = gradients(model)
        for name, true in gradients(plain).items():
            assert (true is None) == (mine[name] is None), name
            if true is not None:
                torch.testing.assert_close(mine[name], true, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own
def test_a_residual_unit_compiles_with_it():
    torch._dynamo.reset()
    plain = nn.Sequential(*(sd.Residual(nn.Linear(8, 8)) for _ in range(3))).double()
    model = copy.deepcopy(plain)
    for m in (plain, model):
        sd.apply(m, sd.Uniform(0.5), closed="forward-only", seed=2)
    sd.compile_blocks(model, backend="eager")
    for _ in range(6):
        for m in (plain, model):
            m.zero_grad()
            m(X).square().sum().backward()
        for mine, true in zip(gradients(model).values(), gradients(plain).values(), strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()


class Collects(nn.Module):
    """Returns what the branches are computed from, if asked for it after `sd.apply`."""

    collects = False

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, gates: tuple[bool, ...] | None = None) -> Tensor:
        collected = []
        for n, (norm, layer) in enumerate(zip(self.norms, self.layers, strict=True)):
            h = norm(x)
            collected.append(h)
            branch = layer(h).tanh()
            x = x + (branch if gates is None or gates[n] else branch.detach())
        return (x, *collected) if self.collects else x


def test_what_else_is_computed_from_a_value_of_a_detached_branch_keeps_its_gradient():
    torch.manual_seed(0)
    model = Collects().double()
    plain = copy.deepcopy(model)
    handle = sd.apply(model, sd.Uniform(0.5), example=X, closed="forward-only", skipped="freeze")
    model.collects = plain.collects = True
    for gates in [(False, False, False), (True, False, True), (False, True, False)]:
        with handle.forced(gates):
            mine = model(X)
        true = plain(X, gates)
        for network, outputs in ((model, mine), (plain, true)):
            network.zero_grad()
            torch.stack([out.pow(3).sum() for out in outputs]).sum().backward()
        for one, other in zip(gradients(model).values(), gradients(plain).values(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


class Scaled(nn.Module):
    def __init__(self, factor_first: bool) -> None:
        super().__init__()
        self.f, self.gamma = nn.Linear(8, 8), nn.Parameter(torch.rand(8))
        self.factor_first = factor_first

    def forward(self, x: Tensor) -> Tensor:
        factors = (self.gamma, self.f(x)) if self.factor_first else (self.f(x), self.gamma)
        return x.addcmul(*factors, value=0.5)


@pytest.mark.parametrize("factor_first", [True, False])
def test_no_gradient_comes_to_either_factor_of_addcmul(factor_first):
    model = nn.Sequential(*(Scaled(factor_first) for _ in range(3))).double()
    original = copy.deepcopy(model)
    handle = sd.apply(model, closed="forward-only", example=X)
    with handle.forced([True, False, True]):
        model(X).sum().backward()
    x = original[0](X)
    original[2](x + (original[1](x) - x).detach()).sum().backward()
    for (name, p), q in zip(model.named_parameters(), original.parameters(), strict=True):
        expected = torch.zeros_like(q) if q.grad is None else q.grad
        torch.testing.assert_close(p.grad, expected, msg=name)
