"""How steady the time and the memory of training steps are, by independent and balanced gates."""

import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from stochastic_depth.extras import require
from stochastic_depth.handle import Handle
from stochastic_depth.lab.bench.results import bench_table, with_progress
from stochastic_depth.lab.bench.workload import (
    Step,
    Workload,
    allocator_peak,
    copy_weights,
    saved_for_backward,
)
from stochastic_depth.lab.options import SteadyOptions
from stochastic_depth.lab.outcomes import CONSTANT
from stochastic_depth.models import CifarResNet
from stochastic_depth.surgery import apply
from stochastic_depth.survival import LinearDecay, Uniform
from stochastic_depth.timing import take_turns
from stochastic_depth.train.runtime import Runtime

INDEPENDENT, BALANCED = "independent gates", "balanced gates"


@dataclass(frozen=True)
class Steadiness:
    """The measurements of the steps of one alternative."""

    seconds: tuple[float, ...]
    kept: tuple[float, ...]
    """Bytes of each step: on a GPU the peak of its allocator, otherwise what is kept for
    backward."""

    @property
    def spread(self) -> float:
        """The standard deviation of the seconds over their mean."""
        return statistics.stdev(self.seconds) / statistics.fmean(self.seconds)

    @property
    def peak_over_mean(self) -> float:
        """The largest bytes of a step over their mean."""
        return max(self.kept) / statistics.fmean(self.kept)

    def largest_batch(self, batch: int, limit: int) -> int:
        """How many images a step may have so that no step keeps more than `limit` bytes."""
        return int(batch * limit / max(self.kept))


class Steady:
    """Training steps of a network under each alternative, all from the same weights.

    Args:
        network: "cifar-resnet", of `depth` layers, or the name of a model of timm.
        final: p_L of linear decay.
    """

    def __init__(self, network: str, depth: int, final: float, workload: Workload) -> None:
        models = [_build(network, depth, workload) for _ in range(3)]
        for model in models[1:]:
            copy_weights(models[0], model)
        example = None if network == "cifar-resnet" else workload.images()[:2]
        self._handles: dict[str, Handle] = {
            CONSTANT: apply(models[0], Uniform(1.0), example=example),
            INDEPENDENT: apply(models[1], LinearDecay(final), example=example),
            BALANCED: apply(models[2], LinearDecay(final), example=example, balance=True),
        }
        pairs = zip(self._handles, models, strict=True)
        self._steps: dict[str, Step] = {name: workload.step(model) for name, model in pairs}
        self._device = workload.runtime.device
        self._on_gpu = self._device.startswith("cuda")
        self.clock = time.perf_counter if self._on_gpu else time.process_time
        self._of_all, self._of_block = self._bytes_kept(models[0])

    def rounds(self, repeats: int, warmup: int = 2) -> Iterator[dict[str, tuple[float, float]]]:
        """Take turns: yields the seconds and the bytes of each step, as in `Steadiness`.

        On a CPU these are seconds of processor time, so that other programs do not count.
        """
        peaks: dict[str, int] = {}

        def watched(name: str) -> None:
            with allocator_peak(self._device) as peak:
                self._steps[name]()
            peaks[name] = peak()

        steps = {name: partial(watched, name) for name in self._steps}
        turns = take_turns(steps if self._on_gpu else self._steps, repeats, warmup, self.clock)
        for seconds in turns:
            kept = peaks or {name: self.kept(handle) for name, handle in self._handles.items()}
            yield {name: (seconds[name], kept[name]) for name in self._steps}

    def kept(self, handle: Handle) -> float:
        """The bytes that the last step kept: all but those of the branches that were closed."""
        gates = handle.gates.tolist()
        closed = [c for c, is_open in zip(self._of_block, gates, strict=True) if not is_open]
        return self._of_all - sum(closed)

    def _bytes_kept(self, model: nn.Module) -> tuple[int, list[int]]:
        """The bytes of a step at constant depth, and the bytes that each closed branch saves."""
        step, handle = self._steps[CONSTANT], self._handles[CONSTANT]
        whole = saved_for_backward(step)
        of_block = []
        for number in range(len(handle.blocks)):
            with handle.forced([other != number for other in range(len(handle.blocks))]):
                of_block.append(whole - saved_for_backward(step))
        return whole, of_block


def steadiness(rounds: list[dict[str, tuple[float, float]]]) -> Mapping[str, Steadiness]:
    """The results of `rounds`, by alternative."""
    return {
        name: Steadiness(tuple(r[name][0] for r in rounds), tuple(r[name][1] for r in rounds))
        for name in rounds[0]
    }


def _build(network: str, depth: int, workload: Workload) -> nn.Module:
    if network == "cifar-resnet":
        return CifarResNet(depth, channels=workload.channels)
    options: dict[str, Any] = {"num_classes": 10, "in_chans": workload.channels}
    if network.startswith("vit"):
        options["img_size"] = workload.size
    with torch.random.fork_rng():
        return require("timm").create_model(network, **options)


@dataclass(frozen=True)
class SteadyResult:
    """The steps of each alternative."""

    alternatives: Mapping[str, Steadiness]
    clock: str
    batch: int
    """Images in a step."""
    limit: int
    """The bytes into which the largest batch has to fit."""

    def to_json(self) -> dict[str, Any]:
        constant = self.alternatives[CONSTANT]
        seconds, kept = statistics.median(constant.seconds), statistics.fmean(constant.kept)
        return {
            "clock": self.clock,
            "alternatives": {
                name: {
                    **asdict(found),
                    "relative_median": statistics.median(found.seconds) / seconds,
                    "spread": found.spread,
                    "mean_kept": statistics.fmean(found.kept) / kept,
                    "peak_kept": max(found.kept) / kept,
                    "peak_over_mean": found.peak_over_mean,
                    "largest_batch": found.largest_batch(self.batch, self.limit),
                }
                for name, found in self.alternatives.items()
            },
        }


def measure(options: SteadyOptions, runtime: Runtime, console: Console) -> SteadyResult:
    """Take steps under independent and balanced gates."""
    workload = Workload(options.batch, options.size, 3, runtime)
    steady = Steady(options.network, options.depth, options.final, workload)
    rounds = list(with_progress(steady.rounds(options.repeats), options.repeats, console))
    limit = round(options.limit * 2**30)
    return SteadyResult(steadiness(rounds), steady.clock.__name__, options.batch, limit)


def tables(result: SteadyResult, options: SteadyOptions, runtime: Runtime) -> Iterator[Table | str]:
    columns = ("median", "spread", "mean bytes", "peak bytes", "peak/mean", "batch")
    title = f"{options.repeats} training steps, batch {options.batch}"
    table = bench_table(title, runtime, "", *columns)
    for name, row in result.to_json()["alternatives"].items():
        table.add_row(
            name,
            f"{row['relative_median']:.3f}",
            f"{100 * row['spread']:.1f} %",
            f"{row['mean_kept']:.3f}",
            f"{row['peak_kept']:.3f}",
            f"{row['peak_over_mean']:.3f}",
            f"{row['largest_batch']:,}",
        )
    yield table
    yield (
        "median, bytes (on a GPU the allocator's peak, else kept for backward): of constant "
        "depth's;\nspread: deviation over mean of the seconds; batch: the largest with at most "
        f"{options.limit:g} GiB in any step"
    )
