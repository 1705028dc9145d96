"""A report on disk: once, or again and again while runs are under way."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from stochastic_depth.report.drawing import file_png, file_svg
from stochastic_depth.report.page import page
from stochastic_depth.report.sections import Report, report
from stochastic_depth.report.sources import Sources, read_sources, watched_files
from stochastic_depth.train.files import write_whole

REFRESH = 10
"""Seconds after which a page that is watched loads itself anew."""


def write_report(paths: Sequence[Path], out: Path, figures: Path | None = None) -> Report:
    """Write the page of what `paths` name to `out`, and every figure to `figures`, as
    PNG and SVG, with its data as CSV.

    Raises:
        RunError: when one of them cannot be understood, or a file cannot be written.
    """
    return _write(read_sources(paths), out, figures, None)


def watch_report(
    paths: Sequence[Path], out: Path, figures: Path | None = None, every: float = 2.0
) -> Iterator[Report]:
    """Write it, and again whenever a journal has changed, until every run is finished.

    Whoever looks at `out` sees a whole page at any time, which loads itself anew.

    Args:
        every: seconds between looks at the journals.
    """
    sources, seen = read_sources(paths), None
    while True:
        # Asked before reading: what comes meanwhile is seen next time.
        now = _changes(sources, paths)
        if now == seen:
            time.sleep(every)
            continue
        sources, seen = read_sources(paths), now
        yield _write(sources, out, figures, REFRESH if sources.under_way else None)
        if not sources.under_way:
            return


def _write(sources: Sources, out: Path, figures: Path | None, refresh: int | None) -> Report:
    made = report(sources)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, page(made, sources, refresh).encode())
    if figures is not None:
        figures.mkdir(parents=True, exist_ok=True)
        for section in made.sections:
            for figure in section.figures:
                write_whole(figures / f"{figure.id}.csv", figure.csv().encode())
                write_whole(figures / f"{figure.id}.svg", file_svg(figure.title, figure))
                write_whole(figures / f"{figure.id}.png", file_png(figure.title, figure))
    return made


def _changes(sources: Sources, paths: Sequence[Path]) -> list[tuple[int, int] | None]:
    """Size and time of every file that a report depends on and that may change."""
    found = []
    for path in watched_files(sources, paths):
        try:
            status = path.stat()
            found.append((status.st_size, status.st_mtime_ns))
        except OSError:
            found.append(None)
    return found
