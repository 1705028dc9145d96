"""Configuration and machine of every run: what they share once, then what sets them apart."""

from collections.abc import Sequence
from typing import Any

from stochastic_depth.report.sources import Trained
from stochastic_depth.report.tables import Table
from stochastic_depth.report.wording import duration
from stochastic_depth.train import best_record

DESCRIBED = ("execution", "machine", "versions", "git_commit", "created")
"""What is shown of `config.json`, besides the configuration."""


def settings(runs: Sequence[Trained]) -> tuple[list[tuple[str, str]], Table]:
    """(What all runs share, a row for each run with the rest.)"""
    described = [
        flat({**run.described["config"], **{k: run.described.get(k) for k in DESCRIBED}})
        for run in runs
    ]
    names = list(dict.fromkeys(name for one in described for name in one))
    shared = [n for n in names if len({one.get(n, "") for one in described}) == 1]
    apart = [name for name in names if name not in shared]
    head = ["run", "state", "test error", "seconds", *apart]
    rows = [
        [run.name, *_outcome(run), *(one.get(name, "") for name in apart)]
        for run, one in zip(runs, described, strict=True)
    ]
    common = [(name, described[0][name]) for name in shared if described[0][name]]
    return common, Table("Runs", head, rows)


def _outcome(run: Trained) -> list[str]:
    reached = run.records[-1].epoch if run.records else 0
    state = "finished" if run.finished else f"{reached:g} of {run.run.config.epochs} epochs"
    if run.failed:
        state = f"failed after {reached:g} epochs"
    if not run.records:
        return [state, "", ""]
    return [
        state,
        f"{best_record(list(run.records)).test_error:.2f} %",
        duration(sum(record.seconds for record in run.records)),
    ]


def flat(described: dict[str, Any]) -> dict[str, str]:
    """Of nested values, by dotted names as on the command line."""
    values: dict[str, str] = {}

    def put(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                put(f"{name}.{key}" if name else key, item)
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            values[name] = "" if shown is None else str(shown)

    put("", described)
    return values
