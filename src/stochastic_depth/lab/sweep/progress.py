"""The progress of a sweep on the console, and its table at the end."""

import statistics
import time
from contextlib import suppress
from datetime import timedelta

from rich.console import Console, Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from stochastic_depth.errors import RunError
from stochastic_depth.lab.formatting import percent, plus_minus, timing_note
from stochastic_depth.lab.outcomes import Outcome, RunOutcome
from stochastic_depth.lab.recorded import read_run
from stochastic_depth.lab.sweep.folder import Sweep
from stochastic_depth.lab.sweep.grid import Point
from stochastic_depth.plain_text import count_text
from stochastic_depth.train.display import LiveDisplay


class SweepProgress(LiveDisplay):
    """Shows the progress of a sweep: live on a terminal, elsewhere as a line for each run."""

    def __init__(self, sweep: Sweep, console: Console, quiet: bool = False) -> None:
        super().__init__(console, quiet)
        self._sweep = sweep
        self._points = sweep.grid.points()
        self._claimed: list[Point] = []
        self._shares = dict.fromkeys(self._points, 0.0)
        self._sizes: dict[Point, int] = {}
        self._ended = {point: sweep.failure(point) for point in self._points if sweep.ended(point)}
        for point in self._points:
            if point not in self._ended:
                with suppress(RunError):  # the worker that takes this run reports what is wrong
                    self._read_shares([point])
        self._began, self._work_before = time.monotonic(), self._work()

    def look(self, claimed: list[Point]) -> None:
        """Read how far the runs are, and print those that have ended.

        Args:
            claimed: the points that workers hold.
        """
        self._claimed = claimed
        for point in self._points:
            if point not in self._ended and self._sweep.ended(point):
                self._ended[point] = self._sweep.failure(point)
                self._tell(point)
        self._read_shares(self._running())

    def _read_shares(self, points: list[Point]) -> None:
        """Read how far these runs are, if their journals have grown."""
        for point in points:
            size = self._sweep.journal_size(point)
            if size != self._sizes.get(point, 0):
                self._sizes[point] = size
                self._shares[point] = self._share(point)

    def _running(self) -> list[Point]:
        return [point for point in self._claimed if point not in self._ended]

    def _share(self, point: Point) -> float:
        """The share of its epochs that a run has trained."""
        records = self._sweep.records(point)
        return records[-1].epoch / self._sweep.config.epochs if records else 0.0

    def counts(self) -> str:
        """Runs done, running and failed, and the time left."""
        failed = sum(failure is not None for failure in self._ended.values())
        done, running = len(self._ended) - failed, len(self._running())
        return (
            f"{done}/{len(self._points)} done, {running} running, "
            f"{failed} failed, left {self._left()}"
        )

    def _tell(self, point: Point) -> None:
        failure = self._ended[point]
        what = f"failed: {failure}"
        if failure is None:
            found = RunOutcome.of(read_run(self._sweep.path(point)).records)
            what = f"test {found.test_error_best:.2f}% in {found.seconds:.1f} s"
        line = f"{point.name} {what}"
        self.say(line if self.live else f"{self.counts()}  {line}")

    def _work(self) -> float:
        """The work that is done, in layers trained."""
        return sum(
            _cost(point) * (1.0 if point in self._ended else share)
            for point, share in self._shares.items()
        )

    def _left(self) -> str:
        """Estimated time to the end, as h:mm:ss."""
        work = self._work()
        if work <= self._work_before:
            return "-:--:--"
        seconds = (time.monotonic() - self._began) / (work - self._work_before)
        return str(timedelta(seconds=round(seconds * (sum(map(_cost, self._points)) - work))))

    def render(self) -> Group:
        head = Table.grid(expand=True, padding=(0, 1))
        head.add_column(ratio=1)
        head.add_column(justify="right", no_wrap=True)
        bar = ProgressBar(total=sum(map(_cost, self._points)), completed=self._work())
        head.add_row(bar, Text(self.counts()))
        runs = Table.grid(expand=True, padding=(0, 1))
        for width in (None, 20):
            runs.add_column(no_wrap=True, width=width)
        for point in self._running():
            bar = ProgressBar(total=1.0, completed=self._shares[point])
            runs.add_row(Text(point.name, style="dim"), bar)
        return Group(head, runs)


def _cost(point: Point) -> float:
    """The work of a run, in expected layers."""
    survival = 1.0 if point.survival is None else point.survival
    mean = statistics.fmean((1.0, survival)) if point.rule == "linear" else survival
    return mean * point.depth


def sweep_table(sweep: Sweep) -> Table:
    """A row for each rule, p_L and depth: means over the seeds that are done.

    A p_L or a depth that is the same in all rows is in the title, so that 80 columns suffice.

    Raises:
        RunError: when a run cannot be read, has lost a part of its journal, is of another sweep,
            or is on other data.
    """
    points = sweep.grid.points()
    finished = {p: read_run(sweep.path(p)) for p in points if sweep.done(p) and sweep.begun(p)}
    sweep.require_own(recorded.run for recorded in finished.values())
    rows: dict[tuple, list] = {}
    for point in points:
        rule = point.gating or point.rule
        rows.setdefault((rule, point.survival, point.depth), []).append(point)
    values = {"p_L": {p for _, p, _ in rows} - {None}, "depth": {depth for _, _, depth in rows}}
    shared = [f"{name} {min(found)}" for name, found in values.items() if len(found) == 1]
    apart = [name for name, found in values.items() if len(found) > 1]
    about = [sweep.config.data.name, sweep.config.model.kind, *shared]
    caption = "seconds of training compare only where one worker ran at a time"
    table = Table(
        title=f"{', '.join(about)}, {count_text(sweep.config.epochs, 'epoch')}; "
        "mean ± deviation over seeds",
        title_justify="left",
        caption="\n".join(filter(None, (caption, timing_note(finished.values())))),
        caption_justify="left",
    )
    table.add_column("gating" if sweep.kind == "gates" else "rule")
    for name in (*apart, "seeds", "test error", "seconds", "active"):
        table.add_column(name, justify="right", no_wrap=True)
    for (rule, survival, depth), points in rows.items():
        done = [finished[point].records for point in points if point in finished]
        cells = ["", "", ""]
        if done:
            found = Outcome.of(done)
            error = percent(found.test_error_best)
            seconds = plus_minus(found.seconds, digits=2 if found.seconds.mean < 100 else 0)
            cells = [error, seconds, plus_minus(found.active_blocks)]
        seeds = f"{len(done)}" if len(done) == len(points) else f"{len(done)} of {len(points)}"
        of_row = {"p_L": "" if survival is None else f"{survival}", "depth": f"{depth}"}
        table.add_row(rule, *(of_row[name] for name in apart), seeds, *cells)
    return table
