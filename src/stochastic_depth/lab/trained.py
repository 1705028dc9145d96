"""Load trained networks for analysis, and store the results in their run folders."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import nn

from stochastic_depth.data import Batches
from stochastic_depth.errors import RunError
from stochastic_depth.files import LARGE, make_folder, read_file, reason, write_whole
from stochastic_depth.handle import Handle
from stochastic_depth.lab.sources import FORMAT
from stochastic_depth.train import Run, reopen, trained_model
from stochastic_depth.train.build import skippable

T = TypeVar("T")


@dataclass(frozen=True)
class TrainedNetwork:
    """A trained network in evaluation mode, and its run."""

    run: Run
    images: Batches
    model: nn.Module
    handle: Handle
    """The handle of the network. For a run of constant depth, p_l = 1 for every block."""
    step: int


def trained(
    path: Path, data: Path | None = None, which: Literal["best", "last"] = "best"
) -> TrainedNetwork:
    """Load the network of a run's checkpoint.

    Raises:
        RunError, DataError, ConfigError: as for `reopen` and `trained_model`.
        ApplyError: when it has no residual blocks.
    """
    run, images = reopen(path, data)
    model, step = trained_model(run, images, which)
    return TrainedNetwork(run, images, model, skippable(model), step)


def analysis_path(run: Run, name: str) -> Path:
    """The path of the result of the analysis `name` of a run."""
    return run.path / "analysis" / f"{name}.json"


def write_analysis(run: Run, name: str, found: dict[str, Any]) -> None:
    """Write the result of an analysis.

    Raises:
        RunError: when it cannot be written.
    """
    path = analysis_path(run, name)
    try:
        make_folder(path.parent)
    except OSError as error:
        raise RunError(f"{path.parent} cannot be made: {reason(error)}") from error
    write_whole(path, json.dumps({"format": FORMAT, **found}, indent=1).encode() + b"\n", inside=2)


def read_analysis(
    run: Run, name: str, settings: dict[str, Any], parse: Callable[[dict[str, Any]], T]
) -> T | None:
    """An earlier result of an analysis with the same `settings`; None if there is no readable one.

    Args:
        parse: builds the result from the content of the file.
    """
    asked = {"format": FORMAT, **settings}
    try:
        found = json.loads(read_file(analysis_path(run, name), LARGE, inside=2))
        same = all(found[key] == value for key, value in asked.items())
        return parse(found) if same else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
