"""How analyses show their progress and their figures."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from stochastic_depth.lab.study import Spread
from stochastic_depth.lab.trained import Progress as Told


@contextmanager
def shown(console: Console, name: str) -> Iterator[Told]:
    """Progress on what goes on in the run `name`: a bar on a terminal, a line a stage elsewhere."""
    stage = ""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(name, total=None)

        def tell(doing: str, done: float, total: float) -> None:
            nonlocal stage
            if doing != stage:
                stage = doing
                bar.reset(task, description=f"{name} {doing}")
                if not console.is_terminal:
                    print_plain(console, f"{name}: {doing}")
            bar.update(task, completed=done, total=total)

        yield tell


def print_plain(console: Console, text: str) -> None:
    """Names of files and runs are data, not markup."""
    console.print(text, soft_wrap=True)


def spread_text(spread: Spread, digits: int = 2) -> str:
    """ "1.20", or "1.20 ± 0.10"."""
    deviation = "" if spread.deviation is None else f" ± {spread.deviation:.{digits}f}"
    return f"{spread.mean:.{digits}f}{deviation}"


def seeds_text(*runs: int) -> str:
    """Of how many runs each figure is."""
    counts = " or ".join(map(str, runs))
    return "1 run" if runs == (1,) else f"mean ± deviation, {counts} runs"
