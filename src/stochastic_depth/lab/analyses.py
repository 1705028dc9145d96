"""The results of analyses, written into the folder of their run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from stochastic_depth.errors import RunError
from stochastic_depth.files import (
    LARGE,
    make_folder,
    read_file,
    reason,
    require_replaceable,
    write_whole,
)
from stochastic_depth.plain_text import command
from stochastic_depth.train import Run, layout
from stochastic_depth.train.run_folder import checksum

FORMAT = 1
"""The format number of the files of an analysis."""

AnalysisName = Literal["ensemble", "pruning"]


def analysis_path(run: Run, name: AnalysisName) -> Path:
    """The path of the result of the analysis `name` of a run."""
    return run.path / layout.ANALYSIS / f"{name}.json"


def write_analysis(run: Run, name: AnalysisName, found: dict[str, Any]) -> None:
    """Write the result of an analysis, with the identity of the run and a checksum.

    Raises:
        RunError: when it cannot be written.
    """
    path = analysis_path(run, name)
    content = {"format": FORMAT, "run": run.id, **found}
    content["sha256"] = checksum(content)
    _make_folder(path)
    write_whole(path, json.dumps(content, indent=1).encode() + b"\n", inside=run.path)


def _make_folder(path: Path) -> None:
    try:
        make_folder(path.parent)
    except OSError as error:
        raise RunError(f"{path.parent} cannot be made: {reason(error)}") from error


def read_analysis(run: Run, name: AnalysisName) -> dict[str, Any]:
    """The result of an analysis as `write_analysis` wrote it.

    Raises:
        RunError: when it cannot be read, has no checksum or another one, is of another run, or has
            an unknown format.
    """
    path = analysis_path(run, name)
    remedy = f"remove it, and measure again by {command('analyze', name, run.path)}"
    try:
        content = read_json(path, inside=run.path)
    except RunError as error:
        raise RunError(f"{error}; {remedy}") from error
    if "sha256" not in content:
        raise RunError(f"{path} has no checksum, as an earlier version left it: {remedy}")
    if content.pop("sha256") != checksum(content):
        raise RunError(f"{path} is damaged or was edited, its checksum does not match: {remedy}")
    if content.get("run") != run.id:
        raise RunError(f"{path} is of another run: {remedy}")
    if content.get("format") != FORMAT:
        raise RunError(
            f"{path} has format {content.get('format')}, this version reads {FORMAT}: use the "
            "version that wrote it"
        )
    return content


def load_or_measure(
    run: Run,
    name: AnalysisName,
    settings: dict[str, Any],
    measure: Callable[[], dict[str, Any]],
    again: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The result of `measure`, read from the run's folder if it is there with the same `settings`.

    A new result is written there. Where that is not possible, it is returned all the same.

    Args:
        again: whether to measure again what was measured before.
        say: called with the path of the result, or with the reason why it cannot be kept: before it
            is measured, if it is known by then.
    """
    path = analysis_path(run, name)
    if not again and (before := same_analysis(run, name, settings)) is not None:
        say(str(path))
        return before
    not_kept = "the result is shown, and not kept, because"
    writable = True
    try:
        _make_folder(path)
        require_replaceable(path)
    except RunError as error:
        writable = False
        say(f"{not_kept} {error}")
    found = {**settings, **measure()}
    if writable:
        try:
            write_analysis(run, name, found)
            say(str(path))
        except RunError as error:
            say(f"{not_kept} {error}")
    return found


def same_analysis(run: Run, name: AnalysisName, settings: dict[str, Any]) -> dict[str, Any] | None:
    """An earlier result of an analysis with the same `settings`; None if there is no valid one."""
    try:
        found = read_analysis(run, name)
    except RunError:
        return None
    return found if settings.items() <= found.items() else None


def read_json(path: Path, inside: Path | None = None) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        inside: as for `read_file`.

    Raises:
        RunError: when it cannot be read, or holds something else.
    """
    try:
        content = json.loads(read_file(path, LARGE, inside))
    except OSError as error:
        raise RunError(f"{path} cannot be read: {reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is not a JSON file ({error})") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} cannot be understood: it holds no object")
    return content
