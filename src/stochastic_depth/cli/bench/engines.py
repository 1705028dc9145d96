"""stochastic-depth bench engines."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from stochastic_depth.cli.bench.options import OfResNet
from stochastic_depth.cli.bench.output import milliseconds, shown, timings
from stochastic_depth.lab.bench.engines import SHARES, designs, engine_steps
from stochastic_depth.lab.bench.workload import Workload
from stochastic_depth.timing import take_turns
from stochastic_depth.train.runtime import Execution


@dataclass(frozen=True)
class Engines(OfResNet):
    """Autograd, compiled blocks and the block program, side by side."""

    def run(self, execution: Execution, console: Console) -> dict[str, Any]:
        workload = Workload(self.batch, self.size, 3, execution)
        names, absent = designs(execution)
        built = shown(
            engine_steps(self.depth, workload, names), len(names) * len(SHARES), console, "building"
        )
        steps = {f"{name} {100 * share:.0f} %": step for name, share, step in built}
        rounds = list(shown(take_turns(steps, self.repeats), self.repeats, console))
        timed = timings(rounds)
        console.print(self._table(list(names), timed))
        console.print(
            "milliseconds of a step, median and quartiles, by the share of active blocks",
            highlight=False,
        )
        for name, reason in absent.items():
            console.print(f"{name}: {reason}", markup=False, highlight=False)
        return {
            "seconds": {name: list(timing.seconds) for name, timing in timed.items()},
            "missing": absent,
        }

    def _table(self, names: list[str], timed: dict[str, Any]) -> Table:
        table = Table(title=f"A training step of ResNet-{self.depth}, batch {self.batch}")
        shares = [f"{100 * share:.0f} %" for share in SHARES]
        for column in ("", *shares, "images/s\nat 100 %"):
            table.add_column(column, justify="right" if column else "left")
        for name in names:
            of_name = [timed[f"{name} {share}"] for share in shares]
            table.add_row(
                name,
                *(
                    "{}\n{}-{}".format(*map(milliseconds, (t.median, *t.quartiles)))
                    for t in of_name
                ),
                f"{self.batch / of_name[0].median:,.0f}",
            )
        return table
