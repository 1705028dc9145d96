"""What holds in the user's own loop, on every rank of a group; run by test_loops_on_ranks.py.

Networks are in float64 without batch normalisation, so that ranks which share a mini-batch must end
where one process ends that has all of it.
"""

import copy
import itertools
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd
from stochastic_depth.distributed import (
    CpuSyncBatchNorm,
    gates_by_rank,
    load_sharded,
    modules_to_shard,
    save_sharded,
    shard_branches,
    skip_closed,
    synchronise_batchnorm,
)
from stochastic_depth.lab.bench.distributed import Collectives
from support.ranks import report

BLOCKS, WIDTH, BATCH, STEPS = 6, 8, 12, 8
OF_BLOCK = OF_REST = 8 * 2 * (WIDTH * WIDTH + WIDTH)
"""The bytes of a block's parameters, and of the two layers around all blocks."""
AGREED = 8 * 2
"""The bytes of the integers by which ranks compare their gates."""
TOLERANCE = 1e-12


def network(skipped: str = "paper", **options: Any) -> tuple[nn.Module, sd.Handle]:
    """A linear stem, residual units, a linear head: the same on every rank."""
    torch.manual_seed(0)
    units = [
        sd.Residual(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)))
        for _ in range(BLOCKS)
    ]
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *units, nn.Linear(WIDTH, WIDTH)).double()
    return model, sd.apply(model, sd.LinearDecay(0.2), skipped=skipped, seed=3, **options)


def mini_batch(step: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, WIDTH, dtype=torch.float64, generator=source)
    return x, torch.randint(WIDTH, (BATCH,), generator=source)


def mine(values: Tensor) -> Tensor:
    return values.chunk(dist.get_world_size())[dist.get_rank()]


def whole(values: Tensor) -> Tensor:
    return values


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2
    )


def train(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    share: Callable[[Tensor], Tensor],
    steps: range = range(STEPS),
) -> None:
    for step in steps:
        x, y = map(share, mini_batch(step))
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach() for p in model.parameters()]


def alone(skipped: str, steps: range = range(STEPS)) -> nn.Module:
    """What one process makes of all of the data."""
    model, _ = network(skipped)
    train(model, sgd(model), whole, steps)
    return model


def assert_same_end(model: nn.Module, other: nn.Module) -> None:
    for (name, p), q, a, b in zip(
        model.named_parameters(), other.parameters(), weights(model), weights(other), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE, msg=name)
        assert (p.grad is None) == (q.grad is None), name


# two ranks, and four


def plain_ddp_trains_like_one_process() -> None:
    variants = ({}, {"static_graph": True}, {"gradient_as_bucket_view": True})
    for skipped, options in itertools.product(("paper", "freeze"), variants):
        model, _ = network(skipped)
        train(DistributedDataParallel(model, **options), sgd(model), mine)
        assert_same_end(model, alone(skipped))


def the_output_of_a_block_may_be_changed_in_place_after_ddp() -> None:
    models = []
    for wrap, share in ((DistributedDataParallel, mine), (lambda model: model, whole)):
        torch.manual_seed(0)
        units = [sd.Residual(nn.Linear(WIDTH, WIDTH)) for _ in range(BLOCKS)]
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *units, nn.ReLU(inplace=True)).double()
        handle = sd.apply(model, sd.LinearDecay(0.2), seed=3)
        train(wrap(model), sgd(model), share)
        assert not all(bool(handle.gates_at(step)[-1]) for step in range(STEPS))
        models.append(model)
    assert_same_end(*models)


def the_composable_replicate_trains_like_one_process_and_skips_closed_blocks() -> None:
    for skipped, skips in itertools.product(("paper", "freeze"), (False, True)):
        model, handle = network(skipped)
        replicate(model)
        if skips:
            skip_closed(model)
        train(model, sgd(model), mine)
        assert_same_end(model, alone(skipped))
        with Collectives() as collectives:
            train(model, sgd(model), mine, range(1))
        sent = AGREED + OF_REST + int(handle.gates.sum()) * OF_BLOCK
        assert (collectives.bytes["allreduce"] == sent) == skips


def ddp_that_searches_for_unused_parameters_finds_none() -> None:
    for skips in (False, True):
        model, _ = network()
        ddp = DistributedDataParallel(model, find_unused_parameters=True)
        if skips:
            skip_closed(ddp)
        train(ddp, sgd(model), mine)
        assert_same_end(model, alone("paper"))


def compiled_blocks_train_like_one_process() -> None:
    for skipped in ("paper", "freeze"):
        model, _ = network(skipped)
        ddp = DistributedDataParallel(sd.compile_blocks(model, backend="aot_eager"))
        skip_closed(ddp)
        train(ddp, sgd(model), mine)
        assert_same_end(model, alone(skipped))


def gates_for_single_samples_are_those_of_one_process() -> None:
    for gate in ("sample", "subset"):
        model, handle = network(gate=gate)
        ddp = DistributedDataParallel(model)
        skip_closed(ddp)
        each = BATCH // dist.get_world_size()
        handle.rank_samples = dist.get_rank() * each, BATCH
        train(ddp, sgd(model), mine)
        other, _ = network(gate=gate)
        train(other, sgd(other), whole)
        assert_same_end(model, other)


def ddp_that_skips_closed_blocks_trains_like_one_process() -> None:
    for skipped, cap in itertools.product(("paper", "freeze"), (25, 0.002)):
        model, _ = network(skipped)
        ddp = DistributedDataParallel(model, bucket_cap_mb=cap)
        skip_closed(ddp)
        train(ddp, sgd(model), mine)
        assert_same_end(model, alone(skipped))


def gradients_of_closed_blocks_are_not_sent() -> None:
    for cap in (25, 0.002):
        model, handle = network()
        ddp = DistributedDataParallel(model, bucket_cap_mb=cap)
        skip_closed(ddp)
        seen = set()
        for step in range(STEPS):
            with Collectives() as collectives:
                ddp(mine(mini_batch(step)[0])).sum().backward()
            open_blocks = int(handle.gates.sum())
            seen.add(open_blocks)
            sent = AGREED + OF_REST + open_blocks * OF_BLOCK
            assert collectives.bytes["allreduce"] == sent
        assert len(seen) > 2


class CallsParts(nn.Module):
    """A network that calls the units of a model under gates that it draws."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.handle = network()

    def forward(self, x: Tensor) -> Tensor:
        with self.handle.draw():
            for unit in self.model:
                x = unit(x)
        return x


def what_has_a_gradient_is_sent_however_a_pass_begins() -> None:
    def units_in_evaluation(model: nn.Module) -> None:
        for unit in model[2:5]:
            unit.eval()

    def units_in_training(model: nn.Module) -> None:
        model.eval()
        for unit in model[2:5]:
            unit.train()

    modes = (units_in_evaluation, units_in_training, nn.Module.eval)
    for number in range(len(modes) + 1):
        ends = []
        for wrap, share in ((DistributedDataParallel, mine), (lambda model: model, whole)):
            model = CallsParts() if number == len(modes) else network()[0]
            net = wrap(model)
            if wrap is DistributedDataParallel:
                skip_closed(net)
            if number < len(modes):
                modes[number](model)
            train(net, sgd(model), share)
            ends.append(model)
        assert_same_end(*ends)


def under_full_depth_every_gradient_is_sent() -> None:
    ends = []
    for wrap, share in ((DistributedDataParallel, mine), (lambda model: model, whole)):
        model, handle = network()
        net = wrap(model)
        if wrap is DistributedDataParallel:
            skip_closed(net)
        with handle.full_depth():
            train(net, sgd(model), share)
        ends.append(model)
    assert_same_end(*ends)


def accumulated_gradients_are_sent_when_a_block_was_open_in_any_pass() -> None:
    for skipped in ("paper", "freeze"):
        ends = []
        for share in (mine, whole):
            model, _ = network(skipped)
            net, no_sync = model, nullcontext
            if share is mine:
                net = DistributedDataParallel(model)
                skip_closed(net)
                no_sync = net.no_sync
            optimizer = sgd(model)
            for step in range(0, STEPS, 2):
                optimizer.zero_grad()
                with no_sync():
                    net(share(mini_batch(step)[0])).square().mean().backward()
                net(share(mini_batch(step + 1)[0])).square().mean().backward()
                optimizer.step()
            ends.append(model)
        assert_same_end(*ends)


def after_remove_every_gradient_is_sent() -> None:
    for again in (False, True):
        ends = []
        for wrap, share in ((DistributedDataParallel, mine), (lambda model: model, whole)):
            model, _ = network()
            net, optimizer = wrap(model), sgd(model)
            if wrap is DistributedDataParallel:
                skip_closed(net)
            train(net, optimizer, share, range(2))
            sd.remove(model)
            if again:
                sd.apply(model, sd.Uniform(0.5))
            train(net, optimizer, share, range(2, 5))
            ends.append(model)
        assert_same_end(*ends)


def passes_that_do_not_learn_on_one_rank_change_nothing() -> None:
    model, handle = network()
    ddp = DistributedDataParallel(model)
    skip_closed(ddp)
    optimizer = sgd(model)
    for step in range(3):
        if dist.get_rank() == 0:
            sd.summary(model, mini_batch(0)[0])
            model.eval()(mini_batch(0)[0])
            model.train()
            with torch.no_grad(), handle.full_depth():  # as update_bn does
                model(mini_batch(0)[0])
        train(ddp, optimizer, mine, range(step, step + 1))
        assert not handle.gates.all()
    assert_same_end(model, alone("paper", range(3)))


class Recomputed(nn.Module):
    """A network behind a layer, recomputed as a whole in the backward pass, or not."""

    def __init__(self, skipped: str, reentrant: bool | None) -> None:
        super().__init__()
        self.model, self.handle = network(skipped)
        self.stem, self.reentrant = nn.Linear(WIDTH, WIDTH).double(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.model(self.stem(x))
        return checkpoint(self.model, self.stem(x), use_reentrant=self.reentrant)


def a_checkpoint_around_the_model_trains_like_one_process() -> None:
    for skipped, reentrant, skips in itertools.product(
        ("paper", "freeze"), (True, False), (True, False)
    ):
        one, model = Recomputed(skipped, None), Recomputed(skipped, reentrant)
        ddp = DistributedDataParallel(model)
        if skips:
            skip_closed(ddp)
        train(one, sgd(one), whole)
        train(ddp, sgd(model), mine)
        assert_same_end(model, one)


def buckets_keep_the_order_of_the_backward_pass() -> None:
    model, handle = network()
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.002)
    order: list[int] = []
    numbers = {p: number for number, p in enumerate(model.parameters())}

    def note(state, bucket):
        order.extend(numbers[p] for p in bucket.parameters())
        return (
            dist.all_reduce(bucket.buffer(), async_op=True)
            .get_future()
            .then(lambda future: future.value()[0])
        )

    ddp.register_comm_hook(None, note)
    for step in range(2):
        order.clear()
        ddp(mine(mini_batch(step)[0])).sum().backward()
        assert not handle.gates.all()
    layers = [number // 2 for number in order]
    assert sorted(set(layers)) == list(range(2 * BLOCKS + 2))
    assert layers == sorted(layers, reverse=True), layers


def buckets_are_sent_while_the_backward_pass_goes_on() -> None:
    """All but the last of them, before the gradient of the first layer is known."""
    for skips in (False, True):
        model, handle = network()
        ddp = DistributedDataParallel(model, bucket_cap_mb=0.002)
        if skips:
            skip_closed(ddp)
        sent: list[int] = []
        with Collectives() as collectives:
            model[0].weight.register_hook(lambda _: sent.append(collectives.calls["allreduce"]))  # noqa: B023
            for step in range(STEPS):
                collectives.calls.clear()
                ddp(mine(mini_batch(step)[0])).sum().backward()
                assert not handle.gates.all()
                if step > 0:  # in which the order of the buckets is found
                    assert sent[-1] == collectives.calls["allreduce"] - 1
        assert max(sent) > 1


def a_forward_pass_that_fails_leaves_no_hook() -> None:
    model, _ = network()
    ddp = DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ddp(torch.zeros(2, WIDTH + 1, dtype=torch.float64))
    ddp(mine(mini_batch(0)[0])).sum().backward()
    assert not any(unit._forward_hooks for unit in model if isinstance(unit, sd.Residual))


def a_model_without_stochastic_depth_is_refused() -> None:
    with pytest.raises(sd.errors.ApplyError, match=r"sd.apply\(model\) first"):
        skip_closed(DistributedDataParallel(nn.Linear(2, 2)))


def a_model_that_is_wrapped_or_sharded_already_is_refused() -> None:
    for wrap in (DistributedDataParallel, replicate, fully_shard):
        plain, _ = network()
        sd.remove(plain)
        with pytest.raises(sd.errors.ApplyError, match=r"sd.apply\(model\) first, then wrap"):
            sd.apply(wrap(plain))
    with pytest.raises(sd.errors.ApplyError, match="Linear is neither a DistributedDataParallel"):
        skip_closed(nn.Linear(2, 2))


def different_gates_are_refused_on_every_rank() -> None:
    def ddp(model: nn.Module) -> nn.Module:
        wrapped = DistributedDataParallel(model)
        skip_closed(wrapped)
        return wrapped

    def sharded(model: nn.Module) -> nn.Module:
        shard_branches(model)
        return fully_shard(model)

    for wrap, what in itertools.product((ddp, sharded), ("seed", "step")):
        model, handle = network()
        net = wrap(model)
        setattr(handle, what, 5 + dist.get_rank())
        with pytest.raises(sd.errors.GateError, match=f"{what} is"):
            net(mine(mini_batch(0)[0])).sum().backward()


def gates_by_rank_differ_and_gradients_are_the_mean() -> None:
    model, handle = network("freeze")
    ddp = DistributedDataParallel(model)
    skip_closed(ddp)
    gates_by_rank(model)
    gradients = []
    for rank in range(dist.get_world_size()):
        copy, of_rank = network("freeze")
        gates_by_rank(copy, rank)
        x = mini_batch(0)[0].chunk(dist.get_world_size())[rank]
        copy(x).sum().backward()
        zero = [torch.zeros_like(p) for p in copy.parameters()]
        gradients.append(
            [z if p.grad is None else p.grad for p, z in zip(copy.parameters(), zero, strict=True)]
        )
        if rank == dist.get_rank():
            expected = of_rank.gates
    ddp(mine(mini_batch(0)[0])).sum().backward()
    assert torch.equal(handle.gates, expected)
    drawn = [torch.zeros(BLOCKS, dtype=torch.bool) for _ in gradients]
    dist.all_gather(drawn, handle.gates)
    assert not all(torch.equal(drawn[0], other) for other in drawn)
    for p, *of_ranks in zip(model.parameters(), *gradients, strict=True):
        mean = torch.stack(of_ranks).mean(0)
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(gradient, mean, rtol=0, atol=TOLERANCE)


def gates_that_differ_and_shards_are_refused_together() -> None:
    model, _ = network()
    shard_branches(model)
    with pytest.raises(sd.errors.GateError, match="sharded model"):
        gates_by_rank(model)
    model, _ = network()
    gates_by_rank(model)
    with pytest.raises(sd.errors.GateError, match="sharded model"):
        shard_branches(model)
    model, _ = network(gate="subset")
    with pytest.raises(sd.errors.GateError, match="no sample"):
        shard_branches(model)


def sharded_by_branches_it_trains_like_one_process_and_closed_blocks_communicate_nothing() -> None:
    for skipped in ("paper", "freeze"):
        model, handle = network(skipped)
        shard_branches(model)
        fully_shard(model)
        optimizer = sgd(model)
        for step in range(STEPS):
            with Collectives() as collectives:
                x, y = map(mine, mini_batch(step))
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
            optimizer.step()
            open_blocks = int(handle.gates.sum())
            assert collectives.calls["allgather_base"] == 1 + 2 * open_blocks
            assert collectives.calls["reduce_scatter_base"] == 1 + open_blocks
        assert_same_end(model, alone(skipped))


def sharded_by_blocks_it_trains_like_one_process_and_reduces_nothing_for_closed_ones() -> None:
    model, handle = network()
    for unit in model:
        if isinstance(unit, sd.Residual):
            fully_shard(unit)
    fully_shard(model)
    train(model, sgd(model), mine, range(STEPS - 1))
    with Collectives() as collectives:
        train(model, sgd(model), mine, range(STEPS - 1, STEPS))
    assert collectives.calls["reduce_scatter_base"] == 1 + int(handle.gates.sum())
    model, _ = network()
    for unit in model[1:-1]:
        fully_shard(unit)
    train(fully_shard(model), sgd(model), mine)
    assert_same_end(model, alone("paper"))


class Block(nn.Module):
    """A block of a model that knows nothing of this library."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.down(torch.relu(self.up(self.norm(x))))


def blocks_of_a_foreign_model_are_sharded_by_their_branches() -> None:
    ends = []
    for share in (mine, whole):
        torch.manual_seed(0)
        model = nn.Sequential(*(Block() for _ in range(4)), nn.Linear(WIDTH, WIDTH)).double()
        handle = sd.apply(model, sd.Uniform(0.5), example=mini_batch(0)[0], seed=1)
        groups = modules_to_shard(model)
        assert groups == [[b.norm, b.up, b.down] for b in model if isinstance(b, Block)]
        if share is mine:
            shard_branches(model)
            fully_shard(model)
        optimizer = sgd(model)
        for step in range(4):
            with Collectives() as collectives:
                train(model, optimizer, share, range(step, step + 1))
            if share is mine:
                open_blocks = int(handle.gates.sum())
                assert collectives.calls["allgather_base"] == 1 + 2 * open_blocks
                assert collectives.calls["reduce_scatter_base"] == 1 + open_blocks
        ends.append(model)
    assert_same_end(*ends)


class Lora(nn.Module):
    """A frozen layer with an adapter of rank 2, as those that are put in place of a layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        source = torch.Generator().manual_seed(0)
        self.down, self.up = (
            nn.Parameter(0.1 * torch.randn(size, dtype=torch.float64, generator=source))
            for size in ((2, WIDTH), (WIDTH, 2))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.down.T @ self.up.T


def checkpoint_blocks(model: nn.Sequential) -> None:
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))


def checkpoint_layers(model: nn.Sequential) -> None:
    apply_activation_checkpointing(model[:-1], check_fn=lambda m: isinstance(m, nn.Linear))


def adapt_layers(model: nn.Sequential) -> None:
    for block in model[:-1]:
        block.up, block.down = Lora(block.up), Lora(block.down)


def add_a_layer_behind_each_block(model: nn.Sequential) -> None:
    """A layer that runs under a closed gate too."""
    for number, block in enumerate(model[:-1]):
        torch.manual_seed(number)
        model[number] = nn.Sequential(block, nn.Linear(WIDTH, WIDTH).double())


def normalise_weights(model: nn.Sequential) -> None:
    for block in model[:-1]:
        nn.utils.parametrizations.weight_norm(block.up)
        nn.utils.parametrize.register_parametrization(block, "gain", nn.Softplus())


WRAPPERS = (
    lambda model: None,
    checkpoint_blocks,
    checkpoint_layers,
    adapt_layers,
    add_a_layer_behind_each_block,
    normalise_weights,
)


def wrapped(wrap: Callable[[nn.Module], None], before: bool) -> tuple[nn.Module, sd.Handle, list]:
    """A foreign model that is wrapped before or after `sd.apply`, its handle and its blocks."""
    torch.manual_seed(0)
    blocks = [Block() for _ in range(4)]
    model = nn.Sequential(*blocks, nn.Linear(WIDTH, WIDTH)).double()
    if before:
        wrap(model)
    handle = sd.apply(model, sd.Uniform(0.5), example=mini_batch(0)[0], seed=1)
    if not before:
        wrap(model)
    return model, handle, blocks


def bytes_of(parameters: Iterable[nn.Parameter]) -> int:
    return sum(8 * p.numel() for p in parameters)


def trained(module: nn.Module) -> int:
    return bytes_of(p for p in module.parameters() if p.requires_grad)


def a_wrapper_changes_nothing_of_which_gradients_are_sent() -> None:
    for wrap, before in itertools.product(WRAPPERS, (True, False)):
        model, handle, blocks = wrapped(wrap, before)
        ddp, optimizer = DistributedDataParallel(model), sgd(model)
        skip_closed(ddp)
        everything, of_blocks = trained(model), [trained(block) for block in blocks]
        for step in range(4):
            with Collectives() as collectives:
                train(ddp, optimizer, mine, range(step, step + 1))
            closed = sum(n for n, gate in zip(of_blocks, handle.gates, strict=True) if not gate)
            sent = collectives.bytes["allreduce"] - AGREED
            assert sent == everything - closed, (wrap, before, step)
        other, *_ = wrapped(wrap, before)
        train(other, sgd(other), whole, range(4))
        assert_same_end(model, other)


def a_wrapper_changes_nothing_of_which_parameters_are_gathered() -> None:
    """All but those of closed branches; the gain of a block is not in a module of its branch."""
    for wrap, before in itertools.product(WRAPPERS, (True, False)):
        model, handle, blocks = wrapped(wrap, before)
        branches = [bytes_of(p for m in b.children() for p in m.parameters()) for b in blocks]
        if wrap is normalise_weights and not before:  # its parametrization was not there yet
            branches = [n - 8 * WIDTH for n in branches]
        rest = bytes_of(model.parameters()) - sum(branches)
        shard_branches(model)
        fully_shard(model)
        optimizer = sgd(model)
        for step in range(4):
            with Collectives() as collectives:
                train(model, optimizer, mine, range(step, step + 1))
            open_blocks = int(handle.gates.sum())
            case = wrap, before, step
            assert collectives.calls["allgather_base"] == 1 + 2 * open_blocks, case
            assert collectives.calls["reduce_scatter_base"] == 1 + open_blocks, case
            gathered = rest + 2 * open_blocks * branches[0]
            assert collectives.bytes["allgather_base"] == gathered, case
        other, *_ = wrapped(wrap, before)
        train(other, sgd(other), whole, range(4))
        assert_same_end(model, other)


class UsesALayerAgain(nn.Module):
    """A model whose output goes through a layer of its first block again."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.handle, blocks = wrapped(lambda model: None, before=True)
        self.again = blocks[0].up

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.model(x))


def a_layer_that_the_model_around_uses_too_is_always_sent() -> None:
    model, other = UsesALayerAgain(), UsesALayerAgain()
    ddp = DistributedDataParallel(model)
    skip_closed(ddp)
    train(ddp, sgd(model), mine, range(4))
    train(other, sgd(other), whole, range(4))
    assert not all(bool(model.handle.gates_at(step)[0]) for step in range(4))
    assert_same_end(model, other)


class ListOfLayers(nn.Module):
    """A block that calls the layers in a list, which is not called itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layers
        return x + second(torch.relu(first(x)))


def layers_in_a_list_are_sharded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(ListOfLayers() for _ in range(4))).double()
    handle = sd.apply(model, sd.Uniform(0.5), example=mini_batch(0)[0], seed=1)
    other = copy.deepcopy(model)
    assert modules_to_shard(model) == [[*block.layers] for block in model]
    shard_branches(model)
    fully_shard(model)
    optimizer = sgd(model)
    for step in range(4):
        with Collectives() as collectives:
            train(model, optimizer, mine, range(step, step + 1))
        assert collectives.calls["allgather_base"] == 2 * int(handle.gates.sum())
    train(other, sgd(other), whole, range(4))
    assert_same_end(model, other)


class OwnParameter(nn.Module):
    """A block that has the parameters of its branch itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH, WIDTH, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(x @ self.weight)


def a_model_in_which_no_module_is_in_a_branch_is_warned_of() -> None:
    model = nn.Sequential(*(OwnParameter() for _ in range(2)))
    sd.apply(model, sd.Uniform(0.5), example=mini_batch(0)[0])
    with pytest.warns(UserWarning, match="no module of Sequential runs only in the branch"):
        shard_branches(model)


def batch_normalisation_over_all_ranks_is_that_of_the_whole_mini_batch() -> None:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    sizes = [2 + other for other in range(ranks)]  # uneven
    source = torch.Generator().manual_seed(0)
    x = 5 + torch.randn(sum(sizes), 3, 4, 4, dtype=torch.float64, generator=source)
    for momentum in (0.1, None):
        plain = nn.BatchNorm2d(3, momentum=momentum).double()
        nn.init.uniform_(plain.weight, generator=torch.Generator().manual_seed(1))
        synced = synchronise_batchnorm(nn.Sequential(nn.BatchNorm2d(3, momentum=momentum).double()))
        synced[0].load_state_dict(plain.state_dict())
        assert type(synced[0]) is CpuSyncBatchNorm
        for _ in range(2):
            all_of_it, part = x.clone().requires_grad_(), x.split(sizes)[rank].clone()
            part.requires_grad_()
            expected, out = plain(all_of_it), synced(part)
            expected.pow(3).sum().backward()
            out.pow(3).sum().backward()
            close = {"rtol": 1e-11, "atol": 1e-11}
            torch.testing.assert_close(out, expected.split(sizes)[rank], **close)
            torch.testing.assert_close(part.grad, all_of_it.grad.split(sizes)[rank], **close)
        gradient = synced[0].weight.grad
        dist.all_reduce(gradient)
        torch.testing.assert_close(gradient, plain.weight.grad, **close)
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(synced[0].state_dict()[name], value, **close)
        torch.testing.assert_close(synced.eval()(x), plain.eval()(x), **close)


def batch_normalisation_of_a_single_value_is_refused() -> None:
    norm = synchronise_batchnorm(nn.BatchNorm2d(3))
    x = torch.ones(int(dist.get_rank() == 0), 3, 1, 1)  # the other ranks have no samples
    with pytest.raises(sd.errors.ConfigError, match="all ranks together have 1"):
        norm(x)
    assert norm.running_var.isfinite().all()


# a checkpoint of two ranks, of one, of four


STAGES = (range(4), range(4, 7), range(7, 9))


def goes_on(folder: Path, stage: int) -> None:
    for skipped in ("paper", "freeze"):
        model, handle = network(skipped)
        shard_branches(model)
        fully_shard(model)
        optimizer = sgd(model)
        if stage > 0:
            load_sharded(folder / f"{skipped}-{stage - 1}", model, optimizer)
            assert handle.step == STAGES[stage].start
        train(model, optimizer, mine, STAGES[stage])
        save_sharded(folder / f"{skipped}-{stage}", model, optimizer)
        assert_same_end(model, alone(skipped, range(STAGES[stage].stop)))


def a_sharded_checkpoint_is_written(folder: Path) -> None:
    goes_on(folder, 0)


def a_checkpoint_that_is_not_there_or_of_another_network_is_refused(folder: Path) -> None:
    other = nn.Sequential(sd.Residual(nn.Linear(2, 2)))
    sd.apply(other)
    optimizer = sgd(other)
    with pytest.raises(sd.errors.CheckpointError, match="cannot be read"):
        load_sharded(folder / "nothing", other, optimizer)
    with pytest.raises(sd.errors.CheckpointError, match="a different network"):
        load_sharded(folder / "paper-0", other, optimizer)


def it_goes_on_on_one_rank(folder: Path) -> None:
    goes_on(folder, 1)


def and_then_on_four(folder: Path) -> None:
    goes_on(folder, 2)


EVERYWHERE = (
    plain_ddp_trains_like_one_process,
    the_output_of_a_block_may_be_changed_in_place_after_ddp,
    ddp_that_skips_closed_blocks_trains_like_one_process,
    gates_by_rank_differ_and_gradients_are_the_mean,
    sharded_by_branches_it_trains_like_one_process_and_closed_blocks_communicate_nothing,
    batch_normalisation_over_all_ranks_is_that_of_the_whole_mini_batch,
    batch_normalisation_of_a_single_value_is_refused,
)
ON_TWO = (
    *EVERYWHERE,
    ddp_that_searches_for_unused_parameters_finds_none,
    the_composable_replicate_trains_like_one_process_and_skips_closed_blocks,
    compiled_blocks_train_like_one_process,
    gates_for_single_samples_are_those_of_one_process,
    gradients_of_closed_blocks_are_not_sent,
    what_has_a_gradient_is_sent_however_a_pass_begins,
    under_full_depth_every_gradient_is_sent,
    accumulated_gradients_are_sent_when_a_block_was_open_in_any_pass,
    after_remove_every_gradient_is_sent,
    passes_that_do_not_learn_on_one_rank_change_nothing,
    a_checkpoint_around_the_model_trains_like_one_process,
    buckets_keep_the_order_of_the_backward_pass,
    buckets_are_sent_while_the_backward_pass_goes_on,
    a_forward_pass_that_fails_leaves_no_hook,
    a_model_without_stochastic_depth_is_refused,
    a_model_that_is_wrapped_or_sharded_already_is_refused,
    different_gates_are_refused_on_every_rank,
    gates_that_differ_and_shards_are_refused_together,
    sharded_by_blocks_it_trains_like_one_process_and_reduces_nothing_for_closed_ones,
    blocks_of_a_foreign_model_are_sharded_by_their_branches,
    a_wrapper_changes_nothing_of_which_gradients_are_sent,
    a_wrapper_changes_nothing_of_which_parameters_are_gathered,
    a_layer_that_the_model_around_uses_too_is_always_sent,
    layers_in_a_list_are_sharded,
    a_model_in_which_no_module_is_in_a_branch_is_warned_of,
)
CHECKS = {
    "two": (
        *ON_TWO,
        a_sharded_checkpoint_is_written,
        a_checkpoint_that_is_not_there_or_of_another_network_is_refused,
    ),
    "one": (it_goes_on_on_one_rank,),
    "four": (*EVERYWHERE, and_then_on_four),
}

if __name__ == "__main__":
    report(CHECKS)
