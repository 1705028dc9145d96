"""What holds for deferred blocks on every rank of a group; run by test_defer_in_use.py."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import stochastic_depth as sd
from stochastic_depth.surgery.applied import applied_to
from support.ranks import report

WIDTH, LENGTH, LAYERS, STEPS = 8, 5, 3, 6


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return self.out((q @ k.transpose(-2, -1)).softmax(-1) @ v)


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.two = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(self.norm(x)).tanh())


class Mixture(nn.Module):
    """Two experts, one for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.route = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList(FeedForward() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.route(x).softmax(-1)
        return sum(expert(x) * weights[..., n : n + 1] for n, expert in enumerate(self.experts))


class Transformer(nn.Module):
    """A transformer as people write one: the trunk adds."""

    def __init__(self, feed_forward: type[nn.Module] = FeedForward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 2)
        self.layers = nn.ModuleList(
            nn.ModuleList([Attention(), feed_forward()]) for _ in range(LAYERS)
        )
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for attention, feed_forward in self.layers:
            x = attention(x) + x
            x = feed_forward(x) + x
        return self.head(x)


def example(step: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(step)
    return torch.randn(4, LENGTH, 4, dtype=torch.float64, generator=source)


def surviving(model: Any, x: Tensor, gates: Any) -> Tensor:
    """The output of the layers that are open, written out."""
    x = model.stem(x)
    for is_open, (attention, feed_forward) in zip(gates, model.layers, strict=True):
        if is_open:
            x = x + attention(x)
            x = x + feed_forward(x)
    return model.head(x)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def applied(model: nn.Module | None = None, **options: Any) -> tuple[Any, sd.Handle]:
    model = Transformer() if model is None else model
    handle = sd.apply(model, sd.Uniform(0.5), example=example(), seed=2, **options)
    assert {found.mechanism for found in applied_to(model).found} == {"deferred"}
    return model, handle


def train(net: nn.Module, model: nn.Module, share: Any, optimizer: Any = None) -> list[float]:
    """`STEPS` steps of plain gradient descent; the loss of each, of all samples."""
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=0.05)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = net(share(example(step))).square().mean()
        loss.backward()
        optimizer.step()
        of_all = loss.detach().clone()
        if share is mine:
            dist.all_reduce(of_all)
            of_all /= dist.get_world_size()
        losses.append(of_all.item())
    return losses


def mine(x: Tensor) -> Tensor:
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def whole(x: Tensor) -> Tensor:
    return x


def on_one_rank(**options: Any) -> tuple[list[float], dict[str, Tensor]]:
    model, _ = applied(options.pop("model", None), **options)
    return train(model, model, whole), dict(model.named_parameters())


def same(losses: list[float], model: nn.Module, one: Any) -> None:
    torch.testing.assert_close(losses, one[0], rtol=1e-10, atol=1e-12)
    for name, parameter in model.named_parameters():
        value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        torch.testing.assert_close(value, one[1][name], rtol=1e-10, atol=1e-12)


def ddp_sends_nothing_of_closed_blocks_and_ends_where_one_process_does() -> None:
    model, _ = applied()
    ddp = DistributedDataParallel(model)
    sd.distributed.skip_closed(ddp)
    same(train(ddp, model, mine), model, on_one_rank())


def ddp_of_a_mixture_ends_where_one_process_does() -> None:
    model, _ = applied(Transformer(Mixture))
    ddp = DistributedDataParallel(model)
    same(train(ddp, model, mine), model, on_one_rank(model=Transformer(Mixture)))


def ddp_under_frozen_gradients_ends_where_one_process_does() -> None:
    model, _ = applied(skipped="freeze")
    same(train(DistributedDataParallel(model), model, mine), model, on_one_rank(skipped="freeze"))


def sharded_branches_are_gathered_only_where_they_are_open() -> None:
    model, handle = applied()
    sd.distributed.shard_branches(model)
    fully_shard(model)
    gathered: list[int] = []
    for number, layer in enumerate(model.layers):
        for part in layer:
            part.register_forward_hook(lambda *_, n=number: gathered.append(n))
    with handle.forced([True, False, True]):
        model(mine(example())).sum().backward()
    assert set(gathered) == {0, 2}
    model.zero_grad()
    same(train(model, model, mine), model, on_one_rank())


def fsdp1_after_apply_ends_where_one_process_does() -> None:
    model, _ = applied()
    net = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    losses = train(net, model, mine)
    one = on_one_rank()
    torch.testing.assert_close(losses, one[0], rtol=1e-10, atol=1e-12)


CHECKS = {
    "two": [
        ddp_sends_nothing_of_closed_blocks_and_ends_where_one_process_does,
        ddp_of_a_mixture_ends_where_one_process_does,
        ddp_under_frozen_gradients_ends_where_one_process_does,
        sharded_branches_are_gathered_only_where_they_are_open,
        fsdp1_after_apply_ends_where_one_process_does,
    ]
}

if __name__ == "__main__":
    report(CHECKS)
