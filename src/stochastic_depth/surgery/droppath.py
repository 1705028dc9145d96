"""A model's own drop path, which stochastic depth takes over: never both at once."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from stochastic_depth.surgery.find import Found

RATE = {"DropPath": "drop_prob", "StochasticDepth": "p"}
"""The attribute with the drop rate, by how the name of the class ends."""


@dataclass(frozen=True)
class Silenced:
    """A drop path whose rate is 0 as long as stochastic depth is applied."""

    module: nn.Module
    attribute: str
    rate: float

    def restore(self) -> None:
        setattr(self.module, self.attribute, self.rate)


def silence(found: Sequence[Found]) -> list[Silenced]:
    """Set the rates of the drop paths inside of the blocks to 0."""
    silenced = []
    for module in dict.fromkeys(m for block in found for m in block.module.modules()):
        for ending, attribute in RATE.items():
            rate = getattr(module, attribute, None)
            if type(module).__name__.endswith(ending) and isinstance(rate, float) and rate > 0:
                silenced.append(Silenced(module, attribute, rate))
                setattr(module, attribute, 0.0)
    return silenced
