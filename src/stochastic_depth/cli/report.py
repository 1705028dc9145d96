"""stochastic-depth report: write the results of runs as one page."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from stochastic_depth.cli.arguments import Flag, parse
from stochastic_depth.cli.outputs import require_output
from stochastic_depth.errors import ConfigError, RunError
from stochastic_depth.extras import require_report


@dataclass(frozen=True)
class ReportOptions:
    """Errors, times, savings, and all figures for which there is data, on one page."""

    runs: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="RUN...", help_behavior_hint=""),
    ]
    """Run folders, folders of runs as compare writes them, sweep folders, and files that bench
    depth wrote."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """The page."""
    figures: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Also write every figure as PNG and SVG, and its data as CSV, into this folder."""
    watch: Flag = False
    """Write the page again whenever a run has progressed, until all are finished."""

    def check(self) -> None:
        if not self.runs:
            raise ConfigError("no RUN is given: name a run folder, or a folder of runs")


def report(arguments: list[str]) -> int:
    asked = parse(ReportOptions, "report", arguments)
    for path in asked.runs:
        if not path.exists():
            raise RunError(
                f"{path} holds no run, it does not exist: give run folders, folders of runs, sweep "
                "folders, or files that bench depth wrote with --out"
            )
    require_output(asked.out, "page")
    from stochastic_depth.cli.console import PlainConsole

    console = PlainConsole()
    with console.starting():
        require_report()
        from stochastic_depth.lab.page import watch_report, write_report
        from stochastic_depth.plain_text import count_text
    if asked.watch:
        for number, _ in enumerate(watch_report(asked.runs, asked.out, asked.figures)):
            if number == 0:
                console.say(f"{asked.out}, again whenever a run has gone on; stop with Ctrl-C")
        return 0
    made = write_report(asked.runs, asked.out, asked.figures)
    drawn = sum(len(section.figures) for section in made.sections)
    console.say(f"{asked.out}: {count_text(drawn, 'figure')}")
    for section in made.sections:
        if not section.figures:
            console.say(section.sentence)
    return 0
