"""Results as tables for a terminal of 80 columns."""

from rich.table import Table

from stochastic_depth.analysis.comparison import Comparison, Spread
from stochastic_depth.train import Run, best_record


def comparison_table(title: str, comparison: Comparison, seeds: int) -> Table:
    """Constant and stochastic depth, a column each."""
    constant, stochastic = comparison.constant, comparison.stochastic
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("1 seed" if seeds == 1 else f"mean ± deviation, {seeds} seeds")
    table.add_column("constant", justify="right")
    table.add_column("stochastic", justify="right")
    for name, unit, a, b in (
        ("test error, best validation", "%", constant.test_error_best, stochastic.test_error_best),
        ("test error, last epoch", "%", constant.test_error_last, stochastic.test_error_last),
        ("seconds of training", "s", constant.seconds, stochastic.seconds),
        ("active blocks", "", constant.active_blocks, stochastic.active_blocks),
    ):
        table.add_row(name, spread_text(a, unit), spread_text(b, unit))
    table.add_row(
        "active blocks, expected", f"{comparison.blocks}", f"{comparison.expected_active_blocks:g}"
    )
    table.add_section()
    table.add_row("training time saved, measured", "", f"{100 * comparison.saving_measured:.1f} %")
    table.add_row("FLOPs saved, expected", "", f"{100 * comparison.saving_expected:.1f} %")
    return table


def run_table(run: Run) -> Table:
    """What one finished run came to."""
    records = run.records()
    best, last = best_record(records), records[-1]
    table = Table(title=str(run.path), title_justify="left")
    table.add_column("")
    table.add_column("epoch", justify="right")
    table.add_column("validation error", justify="right")
    table.add_column("test error", justify="right")
    for name, record in (("best validation", best), ("last", last)):
        table.add_row(
            name,
            f"{record.epoch:g}",
            f"{record.validation_error:.2f} %",
            f"{record.test_error:.2f} %",
        )
    return table


def spread_text(spread: Spread, unit: str = "") -> str:
    """Mean ± deviation."""
    deviation = "" if spread.deviation is None else f" ± {spread.deviation:.2f}"
    return f"{spread.mean:.2f}{deviation} {unit}".rstrip()
