"""Branches that are written into a tensor, part by part: `y[i] = f(x[i])`."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(6), nn.Linear(6, 2)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.out = nn.Linear(6, 6)

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h = self.norm(x)
        weight, index = self.router(h).softmax(-1).max(-1)
        return h, torch.zeros_like(h), weight[:, None], index

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixed(x)

    def mixed(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Assigned(Experts):
    def forward(self, x):
        h = self.norm(x)
        weight, index = self.router(h).softmax(-1).max(-1)
        out = torch.zeros_like(h)
        for n, expert in enumerate(self.experts):
            rows = index == n
            out[rows] = weight[rows, None] * expert(h[rows])
        return x + out

    def mixed(self, x):
        h, out, weight, index = self.routed(x)
        for n, expert in enumerate(self.experts):
            out = out + weight * (index == n)[:, None] * expert(h)
        return out


class AddedTo(Assigned):
    def forward(self, x):
        h = self.norm(x)
        weight, index = self.router(h).softmax(-1).max(-1)
        out = torch.zeros_like(h)
        for n, expert in enumerate(self.experts):
            rows = (index == n).nonzero()[:, 0]
            out[rows] += weight[rows, None] * expert(h[rows])
        return x + out


class ThenALayer(Assigned):
    def forward(self, x):
        h = self.norm(x)
        weight, index = self.router(h).softmax(-1).max(-1)
        out = torch.empty_like(h)
        for n, expert in enumerate(self.experts):
            rows = index == n
            out[rows] = weight[rows, None] * expert(h[rows])
        return x + self.out(out)

    def mixed(self, x):
        return self.out(super().mixed(x))


class InAMethod(Assigned):
    def gather(self, h, weight, index):
        out = torch.zeros_like(h)
        for n, expert in enumerate(self.experts):
            out[index == n] = weight[index == n, None] * expert(h[index == n])
        return out

    def forward(self, x):
        h = self.norm(x)
        return x + self.gather(h, *self.router(h).softmax(-1).max(-1))


class Views(Experts):
    """Fills views of a tensor."""

    def forward(self, x):
        h = self.norm(x)
        out = torch.empty_like(h)
        out[:, :3].copy_(self.experts[0](h)[:, :3])
        out.narrow(1, 3, 3).copy_(self.experts[1](h)[:, 3:])
        return x + self.out(out)

    def mixed(self, x):
        h = self.norm(x)
        return self.out(torch.cat([self.experts[0](h)[:, :3], self.experts[1](h)[:, 3:]], 1))


class InOneExpression(Assigned):
    """As graph networks sum messages."""

    def forward(self, x):
        rows = torch.arange(len(x)).flip(0)
        out = torch.zeros_like(x).index_add_(0, rows, self.experts[0](x[rows]))
        return x + self.out(torch.cat([out[:, :3], x[:, 3:]], 1))

    def mixed(self, x):
        return self.out(torch.cat([self.experts[0](x)[:, :3], x[:, 3:]], 1))


class Network(nn.Module):
    def __init__(self, kind: type[Experts]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(kind() for _ in range(3))

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        for n, block in enumerate(self.blocks):
            x = block(x) if gates is None else x + gates[n] * block.mixed(x)
        return x


class InTheTrunk(Network):
    """The trunk adds what a module has assigned."""

    def __init__(self, kind: type[Experts]) -> None:
        super().__init__(kind)
        self.blocks = nn.ModuleList(Inside(block) for block in self.blocks)

    def forward(self, x, gates=None):
        if gates is not None:
            return super().forward(x, gates)
        for block in self.blocks:
            x = x + block(x)
        return x


class Inside(nn.Module):
    def __init__(self, block: Assigned) -> None:
        super().__init__()
        self.block = block
        self.mixed = block.mixed

    def forward(self, x):
        h, out, weight, index = self.block.routed(x)
        for n, expert in enumerate(self.block.experts):
            out[index == n] = weight[index == n] * expert(h[index == n])
        return out


NETWORKS = [
    *((Network, kind) for kind in (Assigned, AddedTo, ThenALayer, InAMethod, Views)),
    (Network, InOneExpression),
    (InTheTrunk, Assigned),
]


@pytest.mark.parametrize(("network", "kind"), NETWORKS)
def test_outputs_and_gradients_are_those_of_the_surviving_network(network, kind) -> None:
    model = network(kind)
    plain = copy.deepcopy(model)
    handle = sd.apply(model, sd.Uniform(0.5), example=X)
    ran: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda module, args: ran.append(module))
    for gates in itertools.product([True, False], repeat=3):
        model.zero_grad()
        plain.zero_grad()
        ran.clear()
        with handle.forced(gates):
            model.train()(X).square().sum().backward() if any(gates) else model(X)
        expected = plain(X, torch.tensor(gates).float())
        expected.square().sum().backward()
        assert bool(ran) == any(gates)
        if any(gates):
            for one, other in zip(model.parameters(), plain.parameters(), strict=True):
                expected_gradient = torch.zeros_like(other) if other.grad is None else other.grad
                gradient = torch.zeros_like(one) if one.grad is None else one.grad
                torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize(("network", "kind"), NETWORKS)
def test_a_subset_of_the_samples_is_written_and_added(network, kind) -> None:
    model = network(kind)
    plain = copy.deepcopy(model)
    handle = sd.apply(model, sd.Uniform(0.5), example=X, gate="subset")
    for step in range(6):
        handle.step = step
        out = model.train()(X)
        torch.testing.assert_close(out, plain(X, handle.gates.float()[:, :, None]))


@pytest.mark.parametrize("kind", [Assigned, AddedTo, ThenALayer, Views])
def test_the_block_has_all_parameters_of_its_branch(kind) -> None:
    model = Network(kind)
    used = sd.apply(model, sd.Uniform(0.5), example=X)
    model(X).sum().backward()
    for number, block in enumerate(used.blocks):
        inside = model.blocks[number]
        unused = {"out"} if kind in (Assigned, AddedTo) else {"router"} if kind is Views else set()
        names = {f"blocks.{number}.{name}" for name, _ in inside.named_parameters()}
        names = {name for name in names if name.split(".")[2] not in unused}
        assert set(block.parameters) == names
