"""stochastic-depth analyze ensemble RUN..."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stochastic_depth.cli.analyze.options import NetworkAnalysis
from stochastic_depth.cli.analyze.output import print_plain, seeds_text, shown, spread_text
from stochastic_depth.errors import ConfigError
from stochastic_depth.lab.ensemble import Predictor, measured_ensemble, refuse_constant
from stochastic_depth.lab.study import Spread, grouped
from stochastic_depth.lab.trained import found_path

NAMES = {
    "scaled": "full network times p_l",
    "single": "one subnetwork",
    "mean": "mean of {} subnetworks",
    "unscaled": "full network without p_l",
}


@dataclass(frozen=True)
class Ensemble(NetworkAnalysis):
    """Test error and calibration of the full network and of sampled subnetworks."""

    subnetworks: int = 64
    """How many are sampled; means are told for 1, 2, 4, ... of them."""
    seed: int = 0
    """Which are sampled."""

    def analyse(self, console: Console) -> None:
        if self.subnetworks < 1:
            raise ConfigError(f"subnetworks={self.subnetworks}: it must be at least 1")
        runs = self.opened()
        for run in runs:
            refuse_constant(run)
        found: dict[str, list[Predictor]] = {}
        for network in self.networks():
            with shown(console, network.run.path.name) as progress:
                found[network.run.id] = measured_ensemble(
                    network, self.subnetworks, self.seed, progress, self.again
                )
            print_plain(console, str(found_path(network.run, "ensemble")))
        for name, of_kind in grouped(runs).items():
            of_runs = [found[run.id] for run in of_kind]
            alone = len(of_kind) == 1
            title = str(of_kind[0].path) if alone else f"{name}, {seeds_text(len(of_kind))}"
            console.print(ensemble_table(title, of_runs))


def ensemble_table(title: str, of_runs: list[list[Predictor]]) -> Table:
    """A row a predictor; of one run, the deviation is over the subnetworks."""
    table = Table(title=Text(title), title_justify="left")
    table.add_column("")
    for column in ("test error, %", "NLL, nats", "ECE, %"):
        table.add_column(column, justify="right", no_wrap=True)
    for same in zip(*of_runs, strict=True):
        first = same[0]
        if (first.name, first.members) == ("mean", 1):
            continue  # which is "single"
        figures = (
            _figure(first.error, first.error_deviation, [p.error for p in same], 2),
            _figure(first.nll, first.nll_deviation, [p.nll for p in same], 4),
            _figure(
                100 * first.ece,
                None if first.ece_deviation is None else 100 * first.ece_deviation,
                [100 * p.ece for p in same],
                2,
            ),
        )
        table.add_row(NAMES[first.name].format(first.members), *figures)
    return table


def _figure(value: float, deviation: float | None, of_runs: list[float], digits: int) -> str:
    spread = Spread(value, deviation) if len(of_runs) == 1 else Spread.of(of_runs)
    return spread_text(spread, digits)
