"""stochastic-depth bench peers."""

import statistics
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from stochastic_depth.bench.peers import CONSTANT, OURS, peers
from stochastic_depth.bench.workload import Workload
from stochastic_depth.cli.bench.options import Options
from stochastic_depth.cli.bench.output import shown, table_of, timings
from stochastic_depth.timing import take_turns
from stochastic_depth.train.execution import Execution


@dataclass(frozen=True)
class Peers(Options):
    """The same network as other libraries train it."""

    depth: int = 110
    """Of the CIFAR ResNet."""
    batch: int = 128
    """Images a step."""
    size: int = 32
    """Height and width of the images, pixels."""
    final: float = 0.5
    """p_L of linear decay."""

    def run(self, execution: Execution, console: Console) -> dict[str, Any]:
        workload = Workload(self.batch, self.size, 3, execution)
        steps, missing = peers(self.depth, self.final, workload)
        rounds = list(shown(take_turns(steps, self.repeats), self.repeats, console))
        timed = timings(rounds)
        title = f"ResNet-{self.depth}, p_L = {self.final}, batch {self.batch}"
        console.print(table_of(title, timed, self.batch, relative_to=OURS))
        for name, reason in missing.items():
            console.print(f"{name}: {reason}", markup=False, highlight=False)
        return {
            "seconds": {name: list(timing.seconds) for name, timing in timed.items()},
            "ours_is_faster_by": {
                name: statistics.fmean(timing.seconds) / statistics.fmean(timed[OURS].seconds)
                for name, timing in timed.items()
                if name != OURS
            },
            "constant": CONSTANT,
            "missing": missing,
        }
