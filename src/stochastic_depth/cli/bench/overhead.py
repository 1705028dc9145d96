"""stochastic-depth bench overhead."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from stochastic_depth.cli.bench.options import OfResNet
from stochastic_depth.cli.bench.output import shown, table_of, timings
from stochastic_depth.lab.bench.skipping import NETWORKS, closed_unit_seconds, overhead_steps
from stochastic_depth.lab.bench.workload import Workload
from stochastic_depth.timing import paired_ratio, take_turns
from stochastic_depth.train.runtime import Execution


@dataclass(frozen=True)
class Overhead(OfResNet):
    """What the library costs with all gates open."""

    repeats: int = 50
    """Rounds, each of one step of every alternative."""

    def run(self, execution: Execution, console: Console) -> dict[str, Any]:
        steps = overhead_steps(self.depth, Workload(self.batch, self.size, 3, execution))
        rounds = list(shown(take_turns(steps, self.repeats), self.repeats, console))
        timed = timings(rounds)
        title = f"A training step of ResNet-{self.depth}, batch {self.batch}"
        console.print(table_of(title, timed, self.batch))
        without, applied = NETWORKS
        ratio = timed[applied].median / timed[without].median
        paired = paired_ratio(rounds, applied, without)
        low, high = paired.quartiles
        console.print(
            f"cost of the library: {100 * (ratio - 1):+.2f} % by medians; round by round "
            f"{100 * (paired.median - 1):+.2f} % ({100 * (low - 1):+.2f} to "
            f"{100 * (high - 1):+.2f})",
            highlight=False,
        )
        closed = closed_unit_seconds()
        console.print(
            f"a closed unit of a foreign model: {1e6 * closed:.2f} microseconds a forward pass",
            highlight=False,
        )
        return {
            "ratio_of_medians": ratio,
            "median_of_ratios": paired.median,
            "closed_unit_seconds": closed,
            "seconds": {name: list(timing.seconds) for name, timing in timed.items()},
        }
