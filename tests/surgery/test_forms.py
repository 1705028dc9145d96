"""What is a residual block and what is not, in the forms in which people write additions."""

import copy
import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth.errors import ApplyError, UnsupportedBlockError

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.gamma = nn.Linear(8, 8), nn.Parameter(torch.full((8,), 0.5))

    def branch(self, x: Tensor) -> Tensor:
        return torch.tanh(self.f(x))


class Addcmul(Base):
    def forward(self, x):
        return torch.addcmul(x, self.gamma, self.branch(x))


class AddcmulByName(Base):
    def forward(self, x):
        return torch.addcmul(x, tensor1=self.gamma, tensor2=self.branch(x))


class SumOfList(Base):
    def forward(self, x):
        return sum([x, self.branch(x)])


class AddsShortcutInPlace(Base):
    def forward(self, x):
        y = self.branch(x) * 1.0
        y.add_(x)
        return y


class Private(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.__f = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.tanh(self.__f(x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, 8, batch_first=True)

    def forward(self, x):
        return x + self.rnn(x[:, None])[0][:, 0]


class Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


class CustomFunction(Base):
    """A function that nothing can look into, inside of the branch."""

    def forward(self, x):
        return x + self.f(Fused.apply(self.f(x)))


class Weighted(Base):
    """Both operands are multiplied, by parts of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([1.0, 0.5]))

    def forward(self, x):
        return self.weights[0] * x + self.weights[1] * torch.tanh(self.f(x))


FOUND = [
    Weighted,
    Addcmul,
    AddcmulByName,
    SumOfList,
    AddsShortcutInPlace,
    Private,
    Recurrent,
    CustomFunction,
]


@pytest.mark.parametrize("form", FOUND)
def test_a_form_is_found_and_its_closed_block_is_its_input(form):
    model = nn.Sequential(form(), form())
    handle = sd.apply(model, sd.Uniform(0.5), example=X)
    assert len(handle.blocks) == 2
    model.eval()
    with handle.subnetwork([False, False]):
        assert torch.equal(model(X), X)
    with handle.subnetwork([True, False]):
        only_first = model(X)
    assert not torch.equal(only_first, X)


class AddsProduct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), nn.Linear(8, 8)

    def forward(self, x):
        return torch.addcmul(x, self.f(x), torch.sigmoid(self.g(x)))


class AddsProducts(nn.Module):
    """The same in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AddsProduct() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = torch.addcmul(x, block.f(x), torch.sigmoid(block.g(x)))
        return x


@pytest.mark.parametrize(
    "make", [lambda: nn.Sequential(AddsProduct(), AddsProduct()), AddsProducts]
)
def test_both_factors_of_addcmul_belong_to_the_branch(make):
    model = make()
    handle = sd.apply(model, sd.Uniform(0.5), example=X)
    for block in handle.blocks:
        parts = {name.split(".")[-3 if ".f." in name else -2] for name in block.parameters}
        assert parts == {"f", "g"}
    called = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, *_: called.append(module))
    with handle.forced([False, False]):
        assert torch.equal(model(X), X)
    assert not called
    assert sd.summary(model, X).blocks[0].forward == 3 * 2 * 4 * 8 * 8


SCALED = {
    "add": lambda f, x: torch.add(f, x, alpha=0.5),
    "method": lambda f, x: f.add(x, alpha=0.5),
    "in place": lambda f, x: (f * 1.0).add_(x, alpha=0.5),
    "negative": lambda f, x: torch.add(input=f, other=x, alpha=-1),
    "addcmul": lambda f, x: torch.addcmul(f, x, torch.full((8,), 0.5)),
    "addcmul in place": lambda f, x: (f * 1.0).addcmul_(torch.full((8,), 0.5), x),
}


class ScaledShortcut(Base):
    def __init__(self, add) -> None:
        super().__init__()
        self.add = add

    def forward(self, x):
        return self.add(self.branch(x), x)


class ScaledShortcuts(nn.Module):
    """The same in a loop."""

    def __init__(self, add) -> None:
        super().__init__()
        self.add, self.branches = add, nn.ModuleList(Base() for _ in range(2))

    def forward(self, x):
        for base in self.branches:
            x = self.add(base.branch(x), x)
        return x


@pytest.mark.parametrize("add", SCALED.values(), ids=SCALED)
def test_a_shortcut_that_the_addition_itself_multiplies_is_refused_with_the_remedy(add):
    blocks = nn.Sequential(ScaledShortcut(add), ScaledShortcut(add))
    for model in (blocks, ScaledShortcuts(add)):
        with pytest.raises(
            ApplyError, match=r"alpha of torch.add.*write it as alpha \* x \+ f\(x\)"
        ):
            sd.apply(model, example=X)


class ScaledLater(nn.Module):
    """Has another factor after the example."""

    def __init__(self) -> None:
        super().__init__()
        self.branches, self.alpha = nn.ModuleList(Base() for _ in range(2)), 1.0

    def forward(self, x):
        for base in self.branches:
            x = torch.add(base.branch(x), x, alpha=self.alpha)
        return x


def test_a_shortcut_that_is_multiplied_later_is_an_error():
    model = ScaledLater()
    handle = sd.apply(model, sd.Uniform(0.5), example=X)
    model.alpha = 0.5
    with handle.forced([False, True]), pytest.raises(sd.errors.GateError, match="alpha of torch"):
        model(X)
    with pytest.raises(sd.errors.GateError, match="alpha of torch"):
        model.eval()(X)


class ScaledBefore(Base):
    def forward(self, x):
        return 0.5 * x + self.branch(x)


class ScaledBranch(Base):
    def forward(self, x):
        return torch.add(x, self.branch(x), alpha=0.5)


@pytest.mark.parametrize(("form", "closed"), [(ScaledBefore, 0.25), (ScaledBranch, 1.0)])
def test_a_scaled_operand_keeps_its_scale(form, closed):
    model = nn.Sequential(form(), form())
    handle = sd.apply(model, sd.Uniform(0.5), example=X)
    with handle.forced([False, False]):
        torch.testing.assert_close(model(X), closed * X)
    model.eval()
    scale, share = (0.5, 1.0) if form is ScaledBefore else (1.0, 0.5)
    expected = X
    for block in model:
        expected = scale * expected + 0.5 * share * block.branch(expected)
    torch.testing.assert_close(model(X), expected)


class Parallel(nn.Module):
    """A sum of two branches, one of them shorter: no shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.short = nn.Linear(8, 8)
        self.long = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x):
        return self.short(x) + self.long(x)


class ActivatedParallel(Parallel):
    def __init__(self) -> None:
        super().__init__()
        self.short = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
        self.long = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        self.widen = nn.Linear(4, 8)

    def forward(self, x):
        return self.widen(self.short(x) + self.long(x))


class Coupling(nn.Module):
    """One half of the values is changed by the other half."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x):
        one, other = x.chunk(2, -1)
        return torch.cat([other, one + self.f(other)], -1)


@pytest.mark.parametrize("form", [Parallel, ActivatedParallel, Coupling])
def test_what_has_no_shortcut_is_no_block(form):
    with pytest.raises(ApplyError, match="no residual block found"):
        sd.apply(nn.Sequential(form(), form()), example=X)


class Plain(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + torch.relu(self.conv(x))


class UNet(nn.Module):
    """Skip connections of an encoder and a decoder that are added."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.blocks = nn.Sequential(*(Plain() for _ in range(blocks)))

    def forward(self, x):
        skip = torch.relu(self.down(x))
        inner = self.blocks(F.max_pool2d(skip, 2))
        return self.up(F.interpolate(inner, scale_factor=2) + skip)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_a_skip_connection_around_the_inside_of_a_network_is_no_block(blocks):
    handle = sd.apply(UNet(blocks), example=torch.randn(2, 4, 8, 8))
    assert [block.name for block in handle.blocks] == [f"blocks.{n}" for n in range(blocks)]


class SeparableProjection(nn.Module):
    """A projection shortcut of two convolutions, as in GhostNet."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU()),
            nn.Conv2d(8, 8, 1),
        )
        self.path = nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1, groups=4), nn.Conv2d(4, 8, 1))

    def forward(self, x):
        return self.body(x) + self.path(x)


def test_a_projection_of_two_convolutions_is_a_shortcut():
    model, x = nn.Sequential(SeparableProjection(), Plain(8)), torch.randn(2, 4, 8, 8)
    handle = sd.apply(model, example=x)
    assert len(handle.blocks) == 2
    model.eval()
    with handle.subnetwork([False, False]):
        assert torch.equal(model(x), model[0].path(x))


def test_a_sum_of_two_losses_is_no_block():
    class Losses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*(Base_() for _ in range(2)))
            self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

        def forward(self, x):
            y = self.blocks(x)
            return y.pow(2).mean() + self.head(y).logsumexp(-1).mean()

    class Base_(Base):  # noqa: N801
        def forward(self, x):
            return x + self.branch(x)

    handle = sd.apply(Losses(), example=X)
    assert [block.name for block in handle.blocks] == ["blocks.0", "blocks.1"]


def test_plan_lists_the_additions_that_are_not_taken():
    plan = sd.plan(UNet(), torch.randn(2, 4, 8, 8))
    assert plan.complete
    (rejected,) = plan.rejected
    assert "UNet.forward" in rejected
    assert "long skip connection" in rejected
    assert f"not taken: {rejected}" in str(plan)


class Layers(nn.Module):
    """Adds in a loop of its own, in one of these forms."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = self.add(x, torch.tanh(layer(x)), 1.0)
        return x

    def by_hand(self, x, gates):
        for layer, gate in zip(self.layers, gates, strict=True):
            x = self.add(x, torch.tanh(x @ layer.weight.T + layer.bias), gate)
        return x


class ByKeyword(Layers):
    def add(self, x, y, gate):
        return torch.add(input=x, other=y * gate)


class NormalisedShortcut(Layers):
    def add(self, x, y, gate):
        return F.layer_norm(x, (8,)) + y * gate


class PartOfTheValues(Layers):
    def add(self, x, y, gate):
        return torch.cat([x[:, :3] + (y * gate)[:, :3], x[:, 3:]], -1)


def gradients(output, model):
    parameters = list(model.parameters())
    return torch.autograd.grad(output.pow(2).sum(), parameters, materialize_grads=True)


@pytest.mark.parametrize("form", [ByKeyword, NormalisedShortcut, PartOfTheValues])
def test_every_pattern_of_gates_is_the_sum_written_out(form):
    torch.manual_seed(0)
    model, x = form().double(), X.double()
    original = copy.deepcopy(model)
    handle = sd.apply(model, sd.Uniform(0.7), example=x)
    assert len(handle.blocks) == 3
    for gates in itertools.product([False, True], repeat=3):
        expected = original.by_hand(x, gates)
        with handle.forced(list(gates)):
            output = model.train()(x)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
        if any(gates):
            pairs = zip(gradients(output, model), gradients(expected, original), strict=True)
            for ours, truth in pairs:
                torch.testing.assert_close(ours, truth, rtol=0, atol=1e-11)
    torch.testing.assert_close(model.eval()(x), original.by_hand(x, [0.7] * 3), rtol=0, atol=1e-12)


class InProduct(Layers):
    def forward(self, x):
        for layer in self.layers:
            x = torch.addmm(x, torch.tanh(layer(x)), layer.weight)
        return x


class Stacked(Layers):
    def add(self, x, y, gate):
        return torch.stack([x, y * gate]).sum(0)


@pytest.mark.parametrize(
    ("form", "reason"),
    [(InProduct, r"part of a product \(addmm\)"), (Stacked, "a sum over a stack of tensors")],
)
def test_an_addition_that_is_not_taken_is_the_reason_where_there_is_no_other(form, reason):
    with pytest.raises(ApplyError, match=f"not taken: .*{reason}"):
        sd.apply(form(), example=X)
    with pytest.raises(ApplyError, match=f"not taken: .*{reason}"):
        sd.plan(form(), X)


def rows():
    return torch.tensor([[0], [2]]).expand(2, 8)


def weight():
    return torch.linspace(0.5, 2, 8)


def written(x, y):
    out = torch.zeros_like(x)
    out[rows()[:, 0]] = y[:2]
    return x + out


OTHER = {
    "x - f(x)": (lambda x, y: x - y, r"x + -f(x)", lambda x, y: x + -y),
    "sub": (lambda x, y: torch.sub(x, y, alpha=2), r"x + -f(x)", lambda x, y: x + -2 * y),
    "in place": (lambda x, y: x.__isub__(y), r"x + -f(x)", lambda x, y: x + -y),
    "lerp": (
        lambda x, y: torch.lerp(x, y, 0.3),
        "x + w * (f(x) - x)",
        lambda x, y: x + 0.3 * (y - x),
    ),
    "lerp to x": (
        lambda x, y: y.lerp(x, weight()),
        "x + w * (f(x) - x)",
        lambda x, y: x + (1 - weight()) * (y - x),
    ),
    "addcdiv": (
        lambda x, y: torch.addcdiv(x, y, weight(), value=2),
        "x + a / b",
        lambda x, y: x + 2 * y / weight(),
    ),
    "index_add": (
        lambda x, y: x.index_add(0, rows()[:, 0], y[:2]),
        "x + torch.zeros_like(x).index_add(dim, index, f(x))",
        lambda x, y: x + torch.zeros_like(x).index_add(0, rows()[:, 0], y[:2]),
    ),
    "scatter_add": (
        lambda x, y: x.scatter_add(0, rows(), y[:2]),
        "x + torch.zeros_like(x).scatter_add(dim, index, f(x))",
        lambda x, y: x + torch.zeros_like(x).scatter_add(0, rows(), y[:2]),
    ),
}


class Adds(Base):
    def __init__(self, add) -> None:
        super().__init__()
        self.add = add

    def forward(self, x):
        x = x * 1  # which may be changed in place
        return self.add(x, self.branch(x))


class AddsInLoop(nn.Module):
    def __init__(self, add) -> None:
        super().__init__()
        self.add, self.branches = add, nn.ModuleList(Base() for _ in range(2))

    def forward(self, x):
        for base in self.branches:
            x = self.add(x, base.branch(x))
        return x


def in_blocks(add):
    return nn.Sequential(Adds(add), Adds(add))


@pytest.mark.parametrize("make", [in_blocks, AddsInLoop])
@pytest.mark.parametrize("name", OTHER)
def test_a_form_that_is_no_addition_is_named_and_what_it_says_to_write_is_taken(name, make):
    form, remedy, rewritten = OTHER[name]
    with pytest.raises(ApplyError, match=f"not taken: .*write it as {re.escape(remedy)}"):
        sd.apply(make(form), example=X)
    before, model = make(form), make(rewritten)
    model.load_state_dict(before.state_dict())
    handle = sd.apply(model, sd.Uniform(0.5), example=X)
    assert len(handle.blocks) == 2
    with handle.forced([True, True]):
        torch.testing.assert_close(model(X), before(X.clone()))
    with handle.forced([False, False]):
        assert torch.equal(model(X), X)


def written_as_advised(x, y):
    return x + torch.zeros_like(x).index_put((rows()[:, 0],), y[:2])


@pytest.mark.parametrize(
    ("make", "add"),
    [(in_blocks, written), (in_blocks, written_as_advised), (AddsInLoop, written_as_advised)],
)
def test_what_a_helper_writes_into_a_tensor_and_adds_is_a_branch(make, add):
    before, model = make(written), make(add)
    model.load_state_dict(before.state_dict())
    handle = sd.apply(model, sd.Uniform(0.5), example=X)
    assert len(handle.blocks) == 2
    with handle.forced([True, True]):
        torch.testing.assert_close(model(X), before(X.clone()))
    with handle.forced([False, False]):
        assert torch.equal(model(X), X)


def test_what_a_helper_of_a_trunk_writes_into_a_tensor_is_named_with_the_remedy():
    remedy = "write it as torch.zeros_like(x).index_put((i,), f(x[i]))"
    with pytest.raises(UnsupportedBlockError, match=re.escape(remedy)):
        sd.apply(AddsInLoop(written), example=X)


class Latents(nn.Module):
    """A learned array that reads the input, as in a Perceiver."""

    def __init__(self, shape, expanded=False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.latents, self.expanded = nn.Parameter(torch.randn(shape)), expanded
        self.q, self.kv = nn.Linear(8, 8), nn.Linear(8, 8)
        self.layers = nn.Sequential(Adds(torch.add), Adds(torch.add))

    def reads(self, latents, x):
        return F.scaled_dot_product_attention(self.q(latents), self.kv(x), self.kv(x))

    def forward(self, x):
        latents = self.latents
        if self.expanded:
            latents = latents.expand(len(x), -1, -1)
        latents = latents + self.reads(latents, x)
        return self.layers(latents)


@pytest.mark.parametrize("gate", ["batch", "subset"])
@pytest.mark.parametrize("shape", [(1, 3, 8), (3, 8)])
def test_latents_that_are_broadcast_to_the_batch_are_named_and_expanded_they_are_taken(shape, gate):
    x = torch.randn(4, 5, 8)
    plan = sd.plan(Latents(shape), x)
    assert len(plan.blocks) == 2
    (rejected,) = plan.rejected
    assert "Latents.forward" in rejected
    assert "expand it before the branch is computed from it" in rejected
    model = Latents(shape, expanded=True)
    handle = sd.apply(model, sd.Uniform(0.5), example=x, gate=gate)
    assert len(handle.blocks) == 3
    with handle.forced([True] * 3):
        torch.testing.assert_close(model(x), Latents(shape)(x))
    with handle.forced([False] * 3):
        assert torch.equal(model(x), model.latents.expand(4, 3, 8))


class Squeeze(Base):
    """A branch of one token for all."""

    def forward(self, x):
        return self.add(x, self.branch(x.mean(1, keepdim=True)))


class Spread(Squeeze):
    add = staticmethod(torch.add)


class Expanded(Squeeze):
    def add(self, x, y):
        return x + y.expand_as(x)


def test_a_branch_that_is_broadcast_is_named_and_expanded_it_is_taken():
    x = torch.randn(4, 5, 8)
    with pytest.raises(ApplyError, match=r"its branch is broadcast.*x \+ f\(x\)\.expand_as\(x\)"):
        sd.apply(Spread(), example=x)
    model, before = Expanded(), Spread()
    model.load_state_dict(before.state_dict())
    handle = sd.apply(model, sd.Uniform(0.5), example=x, gate="subset")
    with handle.forced([True]):
        torch.testing.assert_close(model(x), before(x))
    with handle.forced([False]):
        assert torch.equal(model(x), x)
