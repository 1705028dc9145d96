"""What experiments and their series are called, and what tells them apart."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from stochastic_depth.data.sources import SOURCES
from stochastic_depth.models.networks import NETWORKS
from stochastic_depth.plain_text import count_text
from stochastic_depth.train import Config, SurvivalConfig


def describe(config: Config) -> str:
    """The network, the data and the epochs, as text."""
    network = NETWORKS[config.model.kind]
    return f"{network.family}-{config.model.depth} on {describe_data(config)}"


def describe_data(config: Config) -> str:
    """The data and the epochs, as text."""
    data = SOURCES[config.data.name].title
    if config.data.train is not None:
        data += f" ({config.data.train:,} images)"
    return f"{data}, {count_text(config.epochs, 'epoch')}"


def titles(configs: Sequence[Config]) -> list[str]:
    """A title of its own for each configuration.

    Where the descriptions are equal, the settings that differ follow. Where these are equal too,
    because the data differ and are described alike, a number follows.
    """
    described = [(describe(config), flat(config.to_json())) for config in configs]
    alike: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
    for title, settings in described:
        alike[title].append(settings)
    found, counts = [], Counter[str]()
    for title, settings in described:
        others = alike[title]
        for name, value in settings.items():
            if value and any(other[name] != value for other in others):
                title += f", {name.rpartition('.')[2].replace('_', ' ')} {value}"
        counts[title] += 1
        found.append(f"{title} ({counts[title]})" if counts[title] > 1 else title)
    return found


def flat(described: dict[str, Any]) -> dict[str, str]:
    """Nested values under dotted names, as on the command line."""
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


CONSTANT = "constant depth"
"""What constant depth is called in every table, chart and sentence."""
RULES = {"linear": "linear decay to", "uniform": "uniform"}


def survival_name(survival: SurvivalConfig) -> str:
    """The rule and its p_L, as in every table, chart and sentence."""
    if survival.rule == "constant":
        return CONSTANT
    return f"{RULES[survival.rule]} {survival.final:g}"


def series_names(stochastic: list[SurvivalConfig]) -> list[str]:
    """A name for each configuration: its rule, and the settings in which the configurations differ.

    Settings with their default value are left out: no two names are alike without them either.
    """
    if len(stochastic) < 2:
        return ["stochastic depth"] * len(stochastic)
    values = [asdict(survival) for survival in stochastic]
    apart = [k for k in values[0] if len({str(value[k]) for value in values}) > 1]
    default = asdict(SurvivalConfig())
    names = []
    for survival, value in zip(stochastic, values, strict=True):
        parts = [survival_name(survival)]
        if "schedule" in apart and survival.schedule.kind != "none":
            parts.append(survival.schedule.name)
        others = (k for k in apart if k not in ("rule", "final", "schedule"))
        chosen = (k for k in others if value[k] != default[k])
        parts += ("balanced" if k == "balance" else f"{k} {value[k]}" for k in chosen)
        names.append(", ".join(parts))
    return names
