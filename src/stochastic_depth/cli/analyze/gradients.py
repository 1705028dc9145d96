"""stochastic-depth analyze gradients RUN..."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stochastic_depth.cli.analyze.options import Analysis
from stochastic_depth.cli.analyze.output import print_plain
from stochastic_depth.lab.gradients import Gradients, gradients, spread_epochs
from stochastic_depth.lab.study import Spread, grouped


@dataclass(frozen=True)
class GradientStrength(Analysis):
    """Mean absolute gradients over training and over depth; reads journals alone."""

    epochs: tuple[float, ...] = ()
    """Which epochs are shown (none: five, from the first to the last)."""
    blocks: int = 18
    """How many blocks are shown, evenly spread over the depth."""

    def analyse(self, console: Console) -> None:
        runs = self.opened()
        epochs = list(self.epochs) or spread_epochs(runs)
        kinds = grouped(runs)
        found = {name: gradients(of_kind, epochs) for name, of_kind in kinds.items()}
        console.print(first_table(epochs, found))
        for name, of_kind in found.items():
            if all(of_kind.blocks):
                console.print(block_table(name, epochs, of_kind, self.blocks))
            else:
                print_plain(
                    console, f"{name}: no gradients of blocks in the journal (none, or older)"
                )


def first_table(epochs: Sequence[float], found: dict[str, Gradients]) -> Table:
    """The first convolution, a column a kind; with one other kind, also its ratio to constant."""
    table = Table(
        title="Mean absolute gradient at the first convolution\nmean over an epoch's steps",
        title_justify="left",
    )
    table.add_column("epoch", justify="right")
    for name in found:
        table.add_column(Text(name), justify="right")
    others = [name for name in found if name != "constant"]
    has_ratio = "constant" in found and len(others) == 1
    if has_ratio:
        table.add_column("ratio", justify="right")
    for at, epoch in enumerate(epochs):
        row = [f"{epoch:g}", *(_small(of_kind.first[at]) for of_kind in found.values())]
        if has_ratio:
            ratio = found[others[0]].first[at].mean / found["constant"].first[at].mean
            row.append(f"{ratio:.2f}")
        table.add_row(*row)
    return table


def block_table(name: str, epochs: Sequence[float], found: Gradients, most: int) -> Table:
    """The first convolution of each block, a column an epoch."""
    table = Table(
        title=Text(
            f"{name}: the same at the first convolution of each block\n"
            "mean over the sampled steps in which it was open"
        ),
        title_justify="left",
    )
    for column in ("block", *(f"epoch {epoch:g}" for epoch in epochs)):
        table.add_column(column, justify="right")
    blocks = len(found.blocks[0])
    shown = min(max(2, most), blocks)
    for block in sorted({round(i * (blocks - 1) / max(1, shown - 1)) for i in range(shown)}):
        values = (of_epoch[block] for of_epoch in found.blocks)
        cells = ("-" if value is None else f"{value:.2e}" for value in values)
        table.add_row(f"{block + 1}", *cells)
    return table


def _small(spread: Spread) -> str:
    deviation = "" if spread.deviation is None else f" ± {spread.deviation:.0e}"
    return f"{spread.mean:.2e}{deviation}"
