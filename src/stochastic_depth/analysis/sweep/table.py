"""What a sweep came to, for a terminal of 80 columns."""

from rich.table import Table

from stochastic_depth.analysis.comparison import Spread
from stochastic_depth.analysis.sweep.folder import Sweep
from stochastic_depth.analysis.tables import spread_text
from stochastic_depth.train import best_record


def sweep_table(sweep: Sweep) -> Table:
    """A row for each rule, p_L and depth: means over the seeds that are done."""
    table = Table(
        title=f"{sweep.config.data.name}, {sweep.config.model.kind}, {sweep.config.epochs} epochs; "
        "mean ± deviation over seeds",
        title_justify="left",
        caption="seconds of training compare only where one worker ran at a time",
        caption_justify="left",
    )
    table.add_column("rule")
    for name in ("p_L", "depth", "seeds", "test error", "seconds", "active"):
        table.add_column(name, justify="right", no_wrap=True)
    rows: dict[tuple, list] = {}
    for point in sweep.grid.points():
        rows.setdefault((point.rule, point.survival, point.depth), []).append(point)
    for (rule, survival, depth), points in rows.items():
        done = [sweep.records(point) for point in points if sweep.done(point)]
        values = [
            [best_record(records).test_error for records in done],
            [sum(record.seconds for record in records) for records in done],
            [sum(r.active_blocks for r in records) / len(records) for records in done],
        ]
        error, seconds, active = (spread_text(Spread.of(v)) if v else "" for v in values)
        seeds = f"{len(done)}" if len(done) == len(points) else f"{len(done)} of {len(points)}"
        p = "" if survival is None else f"{survival}"
        error = f"{error} %" if error else ""
        table.add_row(rule, p, f"{depth}", seeds, error, seconds, active)
    return table
