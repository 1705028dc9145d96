"""Time and memory against depth: both should grow linearly, with stochastic depth more slowly."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from stochastic_depth.errors import RunError
from stochastic_depth.extras import require
from stochastic_depth.files import write_output
from stochastic_depth.lab.bench.results import bench_table, time_in_turns, with_progress
from stochastic_depth.lab.bench.workload import Step, Workload
from stochastic_depth.lab.options import DEPTHS, DepthOptions
from stochastic_depth.models import CifarResNet
from stochastic_depth.processes import fresh_processes, peak_resident, resident
from stochastic_depth.survival import LinearDecay, Survival
from stochastic_depth.timing import Timing
from stochastic_depth.train.runtime import Runtime

FINAL = 0.5
"""p_L of the networks with stochastic depth."""
KINDS = {"constant": None, "stochastic": LinearDecay(FINAL)}
"""The survival probabilities of each kind of network."""


def depths_up_to(deepest: int) -> list[int]:
    """The `DEPTHS` up to `deepest`, and `deepest` itself."""
    return sorted({deepest, *(depth for depth in DEPTHS if depth < deepest)})


def depth_step(depth: int, survival: Survival | None, workload: Workload) -> Step:
    """A training step of a CIFAR ResNet, of constant depth when `survival` is None."""
    return workload.engine_step(CifarResNet(depth, channels=workload.channels), survival)


def training_steps(depths: Sequence[int], workload: Workload) -> dict[tuple[str, int], Step]:
    """A training step of every kind and depth."""
    return {
        (kind, depth): depth_step(depth, survival, workload)
        for depth in depths
        for kind, survival in KINDS.items()
    }


@dataclass(frozen=True)
class Line:
    """value = slope * depth + intercept, fitted by least squares."""

    slope: float
    intercept: float
    r_squared: float
    """The share of the variance that the line explains."""


def fit_line(depths: Sequence[int], values: Sequence[float]) -> Line:
    """The line through `values` that is fitted by least squares."""
    slope, intercept = statistics.linear_regression(depths, values)
    off = sum((v - slope * d - intercept) ** 2 for d, v in zip(depths, values, strict=True))
    mean = statistics.fmean(values)
    variance = sum((value - mean) ** 2 for value in values)
    return Line(slope, intercept, 1 - off / variance if variance else 1.0)


def peak_memory(depth: int, survival: Survival | None, workload: Workload, steps: int = 3) -> int:
    """Peak bytes of training one network, measured in a separate process.

    They include weights, gradients, momentum, images, what is kept for the backward pass, the work
    space of the kernels, and what the memory allocator holds beyond that. On a GPU it is the most
    that PyTorch had allocated. Elsewhere it is the peak of the process's resident memory, minus its
    resident memory before the network was built. Before that, a network of eight layers takes a
    step on two images, so that what PyTorch loads at its first step is not counted.

    Args:
        survival: the survival probabilities of the blocks; None is constant depth.
        steps: how many steps are taken; the peak is that of all of them.

    Raises:
        RunError: when the process was killed, for example for lack of memory.
    """
    try:
        with ProcessPoolExecutor(1, fresh_processes(__name__)) as process:
            return process.submit(_peak_memory, depth, survival, workload, steps).result()
    except BrokenProcessPool as error:
        rule = "constant depth" if survival is None else survival
        raise RunError(
            f"ResNet-{depth}, {rule}, batch {workload.batch}: its process was killed, as it "
            "is when memory runs out; give a smaller batch"
        ) from error


def _peak_memory(depth: int, survival: Survival | None, workload: Workload, steps: int) -> int:
    torch.set_num_threads(workload.runtime.threads)
    first = Workload(2, workload.size, workload.channels, workload.runtime)
    depth_step(8, survival, first)()
    device = workload.runtime.device
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if on_gpu else resident()
    step = depth_step(depth, survival, workload)
    for _ in range(steps):
        step()
    return (torch.cuda.max_memory_allocated(device) if on_gpu else peak_resident()) - before


@dataclass(frozen=True)
class DepthResult:
    """Time and memory of an image, by kind and depth."""

    depths: Sequence[int]
    seconds: Mapping[str, Sequence[Timing]]
    """A timing for each depth, by kind: the share of an image in a step."""
    memory: Mapping[str, Sequence[float]]
    """Peak bytes for each depth, by kind: the share of an image."""
    clock: str

    def lines(self) -> dict[str, dict[str, Line]]:
        """The lines through the medians of the seconds and through the memory, by kind."""
        medians = {kind: [t.median for t in timings] for kind, timings in self.seconds.items()}
        return {
            what: {kind: fit_line(self.depths, of_kind[kind]) for kind in KINDS}
            for what, of_kind in (("seconds", medians), ("memory", self.memory))
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "clock": self.clock,
            "depths": self.depths,
            "seconds_per_image": {k: [list(t.values) for t in self.seconds[k]] for k in KINDS},
            "bytes_per_image": self.memory,
            "lines": {
                what: {kind: asdict(line) for kind, line in of_kind.items()}
                for what, of_kind in self.lines().items()
            },
        }


def measure(options: DepthOptions, runtime: Runtime, console: Console) -> DepthResult:
    """Measure time and memory at every depth, and draw them if that is asked for."""
    depths = depths_up_to(options.deepest)
    if options.plot is not None:
        require("altair", "report")  # before hours of measuring
        require("vl_convert", "report")
    workload = Workload(options.batch, options.size, 3, runtime)
    alternatives = [(kind, depth) for depth in depths for kind in KINDS]
    # Memory is measured first, while no other network exists.
    peaks = {
        (kind, depth): peak_memory(depth, KINDS[kind], workload)
        for kind, depth in with_progress(alternatives, len(alternatives), console, "memory")
    }
    steps = {f"{k} {d}": step for (k, d), step in training_steps(depths, workload).items()}
    timed = time_in_turns(steps, options.repeats, console, runtime, warmup=2)
    result = DepthResult(
        depths,
        {k: [_an_image(timed.timings[f"{k} {d}"], options.batch) for d in depths] for k in KINDS},
        {kind: [peaks[kind, depth] / options.batch for depth in depths] for kind in KINDS},
        timed.clock,
    )
    if options.plot is not None:
        _draw(options.plot, _title(options), result)
    return result


def tables(result: DepthResult, options: DepthOptions, runtime: Runtime) -> Iterator[Table | str]:
    yield _depth_table(_title(options), runtime, result)
    lines = result.lines()
    for kind in KINDS:
        time, space = lines["seconds"][kind], lines["memory"][kind]
        yield (
            f"{kind}: {_line(time, 1e3)} ms, R² {time.r_squared:.4f}; "
            f"{_line(space, 2**-20)} MiB, R² {space.r_squared:.4f}"
        )
    yield (
        "all for an image, 1 / batch of a step: time, median and quartiles; peak memory,\n"
        "weights included, each in a separate process; lines by least squares"
    )


def _title(options: DepthOptions) -> str:
    size = f"{options.size}x{options.size}"
    return f"CIFAR ResNets, batch {options.batch} of {size}, p_L = {FINAL}"


def _draw(path: Path, title: str, result: DepthResult) -> None:
    from stochastic_depth.lab.bench.depth_chart import depth_cost
    from stochastic_depth.lab.drawing import file_png

    write_output(path, file_png(title, depth_cost(result.to_json())))


def _an_image(timing: Timing, batch: int) -> Timing:
    return Timing(tuple(seconds / batch for seconds in timing.values))


def _depth_table(title: str, runtime: Runtime, result: DepthResult) -> Table:
    """Milliseconds (median and quartiles) and MiB per image, by depth and kind."""
    columns = [f"{kind}\n{unit}" for unit in ("ms", "MiB") for kind in KINDS]
    table = bench_table(title, runtime, "\nd", *columns)
    for n, depth in enumerate(result.depths):
        table.add_row(
            str(depth),
            *(_spread(result.seconds[kind][n]) for kind in KINDS),
            *(f"{result.memory[kind][n] / 2**20:,.2f}" for kind in KINDS),
        )
    return table


def _spread(timing: Timing) -> str:
    values = (1e3 * seconds for seconds in (timing.median, *timing.quartiles))
    return "{} ({}-{})".format(*(f"{v:.{2 if v < 10 else 1}f}" for v in values))


def _line(line: Line, unit: float) -> str:
    sign = "-" if line.intercept < 0 else "+"
    return f"{unit * line.slope:.4g} d {sign} {abs(unit * line.intercept):.3g}"
