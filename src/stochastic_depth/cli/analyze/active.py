"""stochastic-depth analyze active RUN..."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stochastic_depth.cli.analyze.options import Analysis
from stochastic_depth.lab.active_blocks import ActiveBlocks, active_blocks


@dataclass(frozen=True)
class Active(Analysis):
    """How many blocks were active, against the exact distribution; reads journals alone."""

    def analyse(self, console: Console) -> None:
        for run in self.opened():
            found = active_blocks(run)
            console.print(active_table(str(run.path), found))
            drawn, exact = found.moments()
            console.print(
                f"mean {drawn[0]:.2f} (exact {exact[0]:.2f}), deviation {drawn[1]:.2f} (exact "
                f"{exact[1]:.2f});\nchi-square test that the one follows the other: "
                f"p = {found.p_value():.2g}",
            )


def active_table(name: str, found: ActiveBlocks) -> Table:
    """Every number of active blocks that was drawn, or should have been at least once."""
    total = sum(found.counts)
    table = Table(title=Text(name), title_justify="left")
    for column in ("active blocks", "drawn", "expected"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    largest = max(*found.counts, *(total * chance for chance in found.expected))
    for active, (count, chance) in enumerate(zip(found.counts, found.expected, strict=True)):
        if count or total * chance >= 0.5:
            bar = "█" * round(36 * count / largest)
            table.add_row(f"{active}", f"{count:,}", f"{total * chance:,.1f}", bar)
    return table
