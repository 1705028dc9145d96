"""Which parameters belong to a block, and what closed blocks do with them."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A branch that ends in a weight of the model, and has one of its own that others share."""

    def __init__(self, shared: nn.Linear) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(8), shared

    def branch(self, x: Tensor, w: Tensor) -> Tensor:
        return torch.tanh(self.f(self.norm(x))) @ w

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return x + self.branch(x, w)


class Tied(nn.Module):
    """`w` is used in all branches and in the trunk, `shared` in all branches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w, self.shared = nn.Parameter(torch.randn(8, 8) / 3), nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block(self.shared) for _ in range(3))

    def forward(self, x: Tensor, gates: tuple[bool, ...] | None = None) -> Tensor:
        for n, block in enumerate(self.blocks):
            x = block(x, self.w) if gates is None else x + gates[n] * block.branch(x, self.w)
        return x @ self.w.T


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(8, 3), nn.ModuleList(nn.Linear(8, 8) for _ in "abc")

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(-1)
        out = torch.zeros_like(x)
        for n, expert in enumerate(self.experts):
            rows = (shares.argmax(-1) == n).nonzero().flatten()
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]) * shares[rows, n : n + 1])
        return out


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(MixtureBlock() for _ in range(2))
        self.head, self.unused = nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class MixtureBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixture = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixture(x)


def test_a_parameter_of_the_trunk_belongs_to_no_block_and_a_shared_one_to_all() -> None:
    model = Tied()
    handle = sd.apply(model, example=X)
    for number, block in enumerate(handle.blocks):
        norm = {f"blocks.{number}.norm.weight", f"blocks.{number}.norm.bias"}
        assert set(block.parameters) == norm | {"shared.weight", "shared.bias"}


def test_experts_that_the_example_does_not_reach_belong_to_their_block() -> None:
    model = Routed()
    handle = sd.apply(model, example=X[:1])
    for number, block in enumerate(handle.blocks):
        inside = [n for n, _ in model.named_parameters() if n.startswith(f"blocks.{number}.")]
        assert sorted(block.parameters) == sorted(inside)
    with handle.forced([False, True]):
        model.train()(X).sum().backward()
    assert all(not p.grad.any() for p in model.blocks[0].parameters())
    assert model.unused.weight.grad is None


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("skipped", ["paper", "freeze"])
@pytest.mark.parametrize("wraps", [False, True])
def test_a_parameter_that_something_open_uses_too_keeps_its_gradient(skipped, wraps) -> None:
    model = Tied()
    plain = copy.deepcopy(model)
    handle = sd.apply(model, sd.Uniform(0.5), example=X, skipped=skipped)
    run = DistributedDataParallel(model) if wraps else model
    for gates in itertools.product([True, False], repeat=3):
        model.zero_grad()
        plain.zero_grad()
        with handle.forced(gates):
            run.train()(X).square().sum().backward()
        plain(X, gates).square().sum().backward()
        torch.testing.assert_close(model.w.grad, plain.w.grad)
        if any(gates):
            torch.testing.assert_close(model.shared.weight.grad, plain.shared.weight.grad)
        elif skipped == "freeze":
            assert model.shared.weight.grad is None


class TiedToTheHead(nn.Module):
    """Layers of all branches have the weight of the head, under names of their own."""

    def __init__(self, units: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(8, 8)
        self.blocks = nn.ModuleList()
        for _ in range(3):
            layer = nn.Linear(8, 8)
            layer.weight = self.head.weight
            self.blocks.append(sd.Residual(layer) if units else Adds(layer))

    def forward(self, x: Tensor, gates: tuple[bool, ...] | None = None) -> Tensor:
        for n, block in enumerate(self.blocks):
            x = block(x) if gates is None else x + gates[n] * block.branch(x)
        return self.head(x)


class Adds(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("skipped", ["paper", "freeze"])
@pytest.mark.parametrize(("units", "example"), [(True, None), (True, X), (False, X)])
def test_a_weight_that_is_tied_to_the_trunk_keeps_its_gradient(skipped, units, example) -> None:
    model = TiedToTheHead(units)
    plain = copy.deepcopy(model)
    handle = sd.apply(model, sd.Uniform(0.5), example=example, skipped=skipped)
    assert [block.parameters for block in handle.blocks] == [
        (f"blocks.{n}.branch.bias",) for n in range(3)
    ]
    run = DistributedDataParallel(model)
    for gates in itertools.product([True, False], repeat=3):
        run.zero_grad()
        plain.zero_grad()
        with handle.forced(gates):
            run.train()(X).square().sum().backward()
        plain(X, gates).square().sum().backward()
        torch.testing.assert_close(model.head.weight.grad, plain.head.weight.grad)


class Reader(nn.Module):
    """Its branch reads what an encoder gives."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return x + self.a(torch.relu(self.b(x) + memory))


class Conditioned(nn.Module):
    """An encoder, with blocks of its own, of which only the branches of the decoder know."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(8, 8)
        self.encoder = nn.Sequential(nn.Linear(8, 8), Adds(nn.Linear(8, 8)), nn.LayerNorm(8))
        self.blocks = nn.ModuleList(Reader() for _ in range(2))
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        memory = self.encoder(x)
        for block in self.blocks:
            x = block(x, memory)
        return self.head(x)


class Checkpointed(Conditioned):
    """The encoder is recomputed in a backward pass of its own, which reports to DDP by itself."""

    throughout = False
    checkpoints = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.checkpoints:
            return super().forward(x)
        x = self.stem(x)
        memory = checkpoint(self.encoder, x, use_reentrant=True)
        for block in self.blocks:
            if self.throughout:
                x = checkpoint(block, x, memory, use_reentrant=True)
            else:
                x = block(x, memory)
        return self.head(x)


class CheckpointedThroughout(Checkpointed):
    throughout = True


class WithTrainingOnly(Conditioned):
    """A block that runs in training mode only comes before all others, and shifts their numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Adds(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.first(x) if self.training else x)


class TwoStreams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + torch.tanh(self.a(x) + y), y + self.b(y)


class Streams(nn.Module):
    """Each branch of the first stream reads the second, which has a residual branch too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(TwoStreams() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = x.flip(0)
        for block in self.blocks:
            x, y = block(x, y)
        return x * y


class Biased(nn.Module):
    """The first block makes a bias, and hands it on."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.f, self.table = nn.Linear(8, 8), nn.Parameter(torch.randn(8)) if first else None

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        bias = self.table * 2 if bias is None else bias
        return x + self.f(x + bias), bias


class HandsOn(nn.Module):
    """Nothing before the blocks has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Biased(n == 0) for n in range(3))
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        bias = None
        for block in self.blocks:
            x, bias = block(x, bias)
        return self.head(x)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("skipped", ["paper", "freeze"])
@pytest.mark.parametrize(
    "kind",
    [Conditioned, Checkpointed, CheckpointedThroughout, WithTrainingOnly, Streams, HandsOn],
)
def test_ddp_gives_the_gradients_of_one_process_whatever_is_closed(kind, skipped) -> None:
    model, alone = kind(), kind()
    handle = sd.apply(model, sd.Uniform(0.5), example=X, skipped=skipped)
    of_alone = sd.apply(alone, sd.Uniform(0.5), example=X, skipped=skipped)
    model.checkpoints = alone.checkpoints = True
    wrapped = DistributedDataParallel(model)
    for gates in itertools.product([True, False], repeat=len(handle.blocks)):
        for each, run, gated in ((model, wrapped, handle), (alone, alone, of_alone)):
            each.zero_grad()
            for _ in range(2):  # DDP fails in the pass after the one that missed a gradient
                with gated.forced(gates):
                    run.train()(X).square().sum().backward()
        for (name, one), other in zip(model.named_parameters(), alone.parameters(), strict=True):
            if other.grad is not None:
                torch.testing.assert_close(one.grad, other.grad, msg=f"{name} {gates}")
            elif skipped == "freeze" and kind is not CheckpointedThroughout:  # whose zeros are real
                assert one.grad is None, f"{name} {gates}"


def test_a_side_output_in_the_graph_does_not_stand_for_the_sum() -> None:
    model = HandsOn()
    handle = sd.apply(model, sd.Uniform(0.5), example=X)
    with handle.forced([False] * 3):
        model.train()(X).sum().backward()
    for block in model.blocks:
        assert not block.f.weight.grad.any()


class Teacher(nn.Module):
    """One half is never trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.teacher = nn.Sequential(*(Adds(nn.Linear(8, 8)) for _ in range(2)))
        self.student = nn.Sequential(*(Adds(nn.Linear(8, 8)) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher(x)
        return self.student(x) - target


def test_blocks_that_run_without_gradients_get_none_when_they_are_closed() -> None:
    model = Teacher()
    handle = sd.apply(model, sd.Uniform(0.5), example=X)
    for gates in itertools.product([True, False], repeat=4):
        model.zero_grad()
        with handle.forced(gates):
            model.train()(X).square().sum().backward()
        assert all(p.grad is None for p in model.teacher.parameters())
        assert all(p.grad is not None for p in model.student.parameters())
