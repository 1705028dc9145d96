"""Runs that differ in their seed alone, side by side with those of other kinds."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from stochastic_depth.train import Config, Run


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each kind, by a short name: "constant", "linear 0.5".

    Kinds of the same name (they differ in depth, say) have the name of their first run's folder.
    """
    kinds: dict[Config, list[Run]] = {}
    for run in runs:
        kinds.setdefault(_kind(run.config), []).append(run)
    names = Counter(survival_name(kind) for kind in kinds)
    return {
        survival_name(kind) if names[survival_name(kind)] == 1 else of_kind[0].path.name: of_kind
        for kind, of_kind in kinds.items()
    }


def survival_name(config: Config) -> str:
    """ "constant", or the rule and its p_L."""
    survival = config.survival
    return "constant" if survival.rule == "constant" else f"{survival.rule} {survival.final:g}"


def _kind(config: Config) -> Config:
    """What a run is, but for its seed, its name and where it found its data."""
    data = replace(config.data, root=None, workers=0, download=False)
    survival = config.survival
    if survival.rule == "constant":
        survival = replace(survival, final=1.0)
    return replace(config, recipe="", seed=0, keep=1, data=data, survival=survival)
