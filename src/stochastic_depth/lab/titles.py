"""What experiments are called: their network, data and epochs, and what else tells them apart."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from stochastic_depth.data.sources import SOURCES
from stochastic_depth.models.networks import NETWORKS
from stochastic_depth.plain_text import count_text
from stochastic_depth.train import Config


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
