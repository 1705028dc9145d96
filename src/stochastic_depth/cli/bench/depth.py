"""stochastic-depth bench depth."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from stochastic_depth.cli.bench.options import Options
from stochastic_depth.cli.bench.output import shown, timings
from stochastic_depth.extras import require
from stochastic_depth.files import write_whole
from stochastic_depth.lab.bench.depth import (
    FINAL,
    KINDS,
    Line,
    depths_up_to,
    fitted_line,
    peak_memory,
    training_steps,
)
from stochastic_depth.lab.bench.workload import Workload
from stochastic_depth.timing import Timing, take_turns
from stochastic_depth.train.runtime import Execution


@dataclass(frozen=True)
class Depth(Options):
    """Time and memory against depth, constant and stochastic."""

    deepest: int = 1202
    """The last of the CIFAR ResNets: those of 20, 56, 110, 218, 434, 866 and 1202 layers come
    before it."""
    batch: int = 128
    """Images a step."""
    size: int = 32
    """Height and width of the images, pixels."""
    repeats: int = 10
    """Rounds, each of one step of every alternative."""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Draw a picture as PNG here."""

    def run(self, execution: Execution, console: Console) -> dict[str, Any]:
        depths = depths_up_to(self.deepest)
        if self.plot is not None:
            require("stochastic_depth.lab.drawing", "report")  # before hours of measuring
        workload = Workload(self.batch, self.size, 3, execution)
        alternatives = [(kind, depth) for depth in depths for kind in KINDS]
        # The memory first: beside its processes there is nothing yet.
        peaks = {
            (kind, depth): peak_memory(depth, kind, workload)
            for kind, depth in shown(alternatives, len(alternatives), console, "memory")
        }
        steps = {f"{k} {d}": step for (k, d), step in training_steps(depths, workload).items()}
        rounds = list(shown(take_turns(steps, self.repeats, 2), self.repeats, console))
        timed = timings(rounds)
        seconds = {
            kind: [_an_image(timed[f"{kind} {depth}"], self.batch) for depth in depths]
            for kind in KINDS
        }
        memory = {kind: [peaks[kind, depth] / self.batch for depth in depths] for kind in KINDS}
        lines = {
            "seconds": {k: fitted_line(depths, [t.median for t in seconds[k]]) for k in KINDS},
            "memory": {kind: fitted_line(depths, memory[kind]) for kind in KINDS},
        }
        title = f"CIFAR ResNets, batch {self.batch} of {self.size}x{self.size}, p_L = {FINAL}"
        console.print(_table(title, depths, seconds, memory))
        for kind in KINDS:
            time, space = lines["seconds"][kind], lines["memory"][kind]
            console.print(
                f"{kind}: {_line(time, 1e3)} ms, R² {time.r_squared:.4f}; "
                f"{_line(space, 2**-20)} MiB, R² {space.r_squared:.4f}",
                highlight=False,
            )
        console.print(
            "all for an image, 1 / batch of a step: time, median and quartiles; peak memory,\n"
            "weights and all, each in a process of its own; lines by least squares",
            highlight=False,
        )
        result = {
            "depths": depths,
            "seconds_per_image": {k: [list(t.seconds) for t in seconds[k]] for k in KINDS},
            "bytes_per_image": memory,
            "lines": {
                what: {kind: asdict(line) for kind, line in of_kind.items()}
                for what, of_kind in lines.items()
            },
        }
        if self.plot is not None:
            _draw(self.plot, title, result)
        return result


def _draw(path: Path, title: str, result: dict[str, Any]) -> None:
    from stochastic_depth.lab.bench.depth_chart import depth_cost
    from stochastic_depth.lab.drawing import file_png

    write_whole(path, file_png(title, depth_cost(result)))


def _an_image(timing: Timing, batch: int) -> Timing:
    return Timing(tuple(seconds / batch for seconds in timing.seconds))


def _table(
    title: str,
    depths: Sequence[int],
    seconds: dict[str, list[Timing]],
    memory: dict[str, list[float]],
) -> Table:
    """Milliseconds (median and quartiles) and MiB an image, by depth and kind."""
    table = Table(title=title)
    for column in (
        "\nd",
        *(f"{kind}\nms" for kind in KINDS),
        *(f"{kind}\nMiB" for kind in KINDS),
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for n, depth in enumerate(depths):
        table.add_row(
            str(depth),
            *(_spread(seconds[kind][n]) for kind in KINDS),
            *(f"{memory[kind][n] / 2**20:,.2f}" for kind in KINDS),
        )
    return table


def _spread(timing: Timing) -> str:
    values = (1e3 * seconds for seconds in (timing.median, *timing.quartiles))
    return "{} ({}-{})".format(*(f"{v:.{2 if v < 10 else 1}f}" for v in values))


def _line(line: Line, unit: float) -> str:
    sign = "-" if line.intercept < 0 else "+"
    return f"{unit * line.slope:.4g} d {sign} {abs(unit * line.intercept):.3g}"
