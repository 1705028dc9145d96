"""What people ask first: error, time, and the saving against the expected."""

from dataclasses import dataclass

from stochastic_depth.report import measures
from stochastic_depth.report.experiment import Experiment
from stochastic_depth.report.tables import Table
from stochastic_depth.report.wording import duration, percent, share


@dataclass(frozen=True)
class Tile:
    """One number, large, and what to hold it against."""

    label: str
    value: str
    beside: str


def tiles(experiment: Experiment) -> list[Tile]:
    """Of stochastic depth, or of constant depth if that is all there is."""
    now = experiment.settled()
    series = now.main
    base = now.constant if now.stochastic else None
    error, seconds = measures.error_at_best(series), measures.training_seconds(series)
    made = [
        Tile(
            f"Test error, {series.name}",
            percent(error),
            f"{base.name} {percent(measures.error_at_best(base))}" if base else "",
        ),
        Tile(
            "Training time",
            duration(seconds.mean),
            f"{base.name} {duration(measures.training_seconds(base).mean)}" if base else "",
        ),
    ]
    if base:
        saved = share(measures.time_saved(series, base))
        made.append(Tile("Time saved", saved, f"expected from FLOPs {share(series.cost.saving)}"))
    return made


def overview(experiments: list[Experiment]) -> Table:
    """Experiment by experiment."""
    rows = []
    for now in (experiment.settled() for experiment in experiments):
        series, base = now.main, now.constant
        both = base is not None and bool(now.stochastic)
        rows.append(
            [
                now.title,
                percent(measures.error_at_best(base)) if base else "",
                percent(measures.error_at_best(series)) if now.stochastic else "",
                share(measures.time_saved(series, base)) if base and both else "",
                share(series.cost.saving) if now.stochastic else "",
            ]
        )
    head = ["", "constant", "stochastic", "time saved", "FLOPs saved"]
    return Table("Test error and saving", head, rows)
