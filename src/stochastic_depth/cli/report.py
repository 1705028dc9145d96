"""stochastic-depth report RUNS..."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from stochastic_depth.cli.console import PlainConsole
from stochastic_depth.errors import ConfigError
from stochastic_depth.lab.page import watch_report, write_report


@dataclass(frozen=True)
class Report:
    """Errors, times, savings and the figures there is data for, on one page."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUNS")]
    """Run folders, folders of runs as compare leaves them, sweep folders, and files that bench
    depth wrote."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """The page."""
    figures: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Write every figure too, as PNG and SVG, and its data as CSV."""
    watch: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write it anew whenever a run has gone on, until all are finished."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("RUNS is empty: name a run folder, or a folder of runs")


def main(arguments: list[str]) -> int:
    asked = tyro.cli(Report, prog="stochastic-depth report", args=arguments)
    console = PlainConsole()
    if asked.watch:
        for number, _ in enumerate(watch_report(asked.runs, asked.out, asked.figures)):
            if number == 0:
                _say(console, f"{asked.out}, anew whenever a run has gone on; stop with Ctrl-C")
        return 0
    made = write_report(asked.runs, asked.out, asked.figures)
    drawn = sum(len(section.figures) for section in made.sections)
    _say(console, f"{asked.out}: {drawn} figures")
    for title, command in made.missing:
        _say(console, f"no data for: {title}; {command}")
    return 0


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True)
