"""Bytes sent and time of training in several processes, at constant depth and at p_L = 0.5."""

import itertools
import json
import os
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from stochastic_depth.distributed import shard_branches, skip_closed
from stochastic_depth.distributed.world import process_group
from stochastic_depth.lab.bench.results import bench_table
from stochastic_depth.lab.options import DistributedOptions
from stochastic_depth.lab.titles import CONSTANT
from stochastic_depth.models import CifarResNet
from stochastic_depth.randomness import generator
from stochastic_depth.residual import Residual
from stochastic_depth.surgery import apply
from stochastic_depth.survival import LinearDecay, Uniform
from stochastic_depth.timing import take_turns
from stochastic_depth.torch_private import TorchDispatchMode, tree_leaves
from stochastic_depth.train.build import build_optimizer
from stochastic_depth.train.config import OptimizerConfig
from stochastic_depth.train.runtime import Runtime


class Collectives(TorchDispatchMode):
    """While entered, counts collectives and the bytes of their tensors, by kind.

    The kinds are named as PyTorch names them: allreduce, allgather_base, reduce_scatter_base.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        """Bytes of the whole tensors, of which `sent` is what a process sends."""

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if operator.namespace == "c10d":
            kind = operator._opname.strip("_")
            if sizes := [leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]:
                self.calls[kind] += 1
                self.bytes[kind] += sum(sizes) if kind.startswith("allreduce") else max(sizes)
        return operator(*args, **(kwargs or {}))

    def sent(self, ranks: int) -> float:
        """The bytes that each process sends by the algorithms that send least.

        Of n ranks, each sends 2 (n - 1) / n of a tensor that is all-reduced, and (n - 1) / n of one
        that is gathered, broadcast, or reduced and scattered.
        """
        twice = sum(size for kind, size in self.bytes.items() if kind.startswith("allreduce"))
        return (ranks - 1) / ranks * (self.bytes.total() + twice)


def ddp_that_skips(model: nn.Module) -> nn.Module:
    ddp = DistributedDataParallel(model)
    skip_closed(ddp)
    return ddp


def fsdp_of_blocks(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        if isinstance(module, Residual):
            fully_shard(module)
    fully_shard(model)
    return model


def fsdp_of_branches(model: nn.Module) -> nn.Module:
    shard_branches(model)
    fully_shard(model)
    return model


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": DistributedDataParallel,
    "DDP, find_unused_parameters": partial(DistributedDataParallel, find_unused_parameters=True),
    "DDP, skip_closed": ddp_that_skips,
    "FSDP2 of blocks": fsdp_of_blocks,
    "FSDP2, shard_branches": fsdp_of_branches,
}
SURVIVALS = {CONSTANT: Uniform(1.0), "p_L = 0.5": LinearDecay(0.5)}


@dataclass(frozen=True)
class Sent:
    """The measurements of one alternative, means over its steps."""

    seconds: list[float]
    """Seconds of each round."""
    bytes: float
    """Bytes that each process sends in a step."""
    calls: float
    """Collectives in a step."""
    open_share: float
    """The share of parameters that are not in a closed block."""


def sent_by(
    ranks: int, depth: int, batch: int, size: int, repeats: int, threads: int
) -> dict[str, dict[str, Sent]]:
    """Time and traffic of training steps of ResNet-`depth` in `ranks` processes, by way and depth.

    Args:
        batch: images in a step, of all processes together.
        size: the height and width of the images, in pixels.
        threads: how many threads each process has.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = ranks, folder, depth, batch, size, repeats, threads
        spawn(_process, args=arguments, nprocs=ranks)
        result = json.loads((Path(folder) / "result.json").read_text())
    return {
        way: {name: Sent(**values) for name, values in of_way.items()}
        for way, of_way in result.items()
    }


def _process(
    rank: int,
    ranks: int,
    folder: str,
    depth: int,
    batch: int,
    size: int,
    repeats: int,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    store = f"file://{folder}/store"
    with process_group("gloo", init_method=store, rank=rank, world_size=ranks):
        result = _measure_here(ranks, depth, batch, size, repeats)
    if rank == 0:
        (Path(folder) / "result.json").write_text(json.dumps(result))


def _measure_here(
    ranks: int, depth: int, batch: int, size: int, repeats: int
) -> dict[str, dict[str, object]]:
    """What this process measured, by way and depth."""
    steps = {
        f"{way}, {name}": _Step(wrap, survival, depth, batch // ranks, size)
        for way, wrap in WAYS.items()
        for name, survival in SURVIVALS.items()
    }
    rounds = list(take_turns(steps, repeats))
    result: dict[str, dict[str, object]] = {way: {} for way in WAYS}
    for way, name in itertools.product(WAYS, SURVIVALS):
        counts = list(steps[f"{way}, {name}"].count_traffic(ranks, repeats))
        of_step = [sum(column) / repeats for column in zip(*counts, strict=True)]
        result[way][name] = {
            "seconds": [seconds[f"{way}, {name}"] for seconds in rounds],
            **dict(zip(("bytes", "calls", "open_share"), of_step, strict=True)),
        }
    return result


class _Step:
    """A training step of a new network."""

    def __init__(
        self,
        wrap: Callable[[nn.Module], nn.Module],
        survival: Uniform | LinearDecay,
        depth: int,
        batch: int,
        size: int,
    ) -> None:
        model = CifarResNet(depth)
        self._handle = apply(model, survival)
        self._whole = sum(p.numel() for p in model.parameters())
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        self._sizes = [sum(sizes[n] for n in block.parameters) for block in self._handle.blocks]
        self._net = wrap(model)
        self._optimizer = build_optimizer(OptimizerConfig(), self._net)
        self._images = torch.randn(batch, 3, size, size, generator=generator("bench"))
        self._labels = torch.arange(batch) % 10

    def __call__(self) -> None:
        self._optimizer.zero_grad()
        F.cross_entropy(self._net(self._images), self._labels).backward()
        self._optimizer.step()

    def count_traffic(self, ranks: int, steps: int) -> Iterator[tuple[float, int, float]]:
        """Yields bytes, collectives, and the share of parameters that are not in a closed block."""
        for _ in range(steps):
            with Collectives() as collectives:
                self()
            gates = self._handle.gates.tolist()
            closed = sum(n for n, is_open in zip(self._sizes, gates, strict=True) if not is_open)
            yield collectives.sent(ranks), collectives.calls.total(), 1 - closed / self._whole


@dataclass(frozen=True)
class DistributedResult:
    """What each way of training sent, by number of processes, way and depth."""

    ranks: Mapping[int, Mapping[str, Mapping[str, Sent]]]
    threads: int
    """Threads of each process."""

    def to_json(self) -> dict[str, Any]:
        ranks = {
            str(ranks): {
                way: {name: asdict(sent) for name, sent in of_way.items()}
                for way, of_way in of_ranks.items()
            }
            for ranks, of_ranks in self.ranks.items()
        }
        return {"clock": "perf_counter", "threads": self.threads, "ranks": ranks}


def measure(options: DistributedOptions, runtime: Runtime, console: Console) -> DistributedResult:
    """Measure every way of training in several processes, at constant depth and at p_L = 0.5."""
    threads = max(1, (os.cpu_count() or 1) // max(options.ranks))
    found = {}
    for ranks in options.ranks:
        with console.status(f"{ranks} processes"):
            found[ranks] = sent_by(
                ranks, options.depth, options.batch, options.size, options.repeats, threads
            )
    return DistributedResult(found, threads)


def tables(
    result: DistributedResult, options: DistributedOptions, runtime: Runtime
) -> Iterator[Table | str]:
    for ranks, sent in result.ranks.items():
        yield _sent_table(options, runtime, ranks, sent)
    yield (
        "each cell: constant depth, p_L = 0.5, and their ratio; float32, eager, "
        f"{result.threads} thread(s) a process\nsent: by each process in a step; open: of the "
        "parameters, those in no closed block"
    )


def _sent_table(
    options: DistributedOptions,
    runtime: Runtime,
    ranks: int,
    sent: Mapping[str, Mapping[str, Sent]],
) -> Table:
    title = f"ResNet-{options.depth}, {ranks} processes, {options.batch} images a step"
    columns = ("sent\nMiB", "collectives", "median\nms", "open")
    table = bench_table(title, runtime, "", *columns)
    for way, of_way in sent.items():
        constant, stochastic = (of_way[name] for name in SURVIVALS)
        pairs = [
            (constant.bytes / 2**20, stochastic.bytes / 2**20, "{:.2f}"),
            (constant.calls, stochastic.calls, "{:.0f}"),
            (*(1e3 * statistics.median(s.seconds) for s in (constant, stochastic)), "{:.0f}"),
        ]
        cells = [
            f"{form.format(before)} {form.format(after)}\n{after / before:.3f}"
            for before, after, form in pairs
        ]
        table.add_row(way, *cells, f"{stochastic.open_share:.3f}")
    return table
