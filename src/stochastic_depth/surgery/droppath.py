"""A model's own drop path, which stochastic depth takes over: never both at once."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from stochastic_depth.errors import SurvivalError
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
    silenced = [drop_path for block in found for drop_path in _inside(block)]
    for drop_path in silenced:
        setattr(drop_path.module, drop_path.attribute, 0.0)
    return silenced


def own_rates(found: Sequence[Found]) -> list[float]:
    """The drop rate that each block has of its own, 0 where it has no drop path.

    Raises:
        SurvivalError: when the drop paths of one block have different rates, or none has any.
    """
    rates = [{drop_path.rate for drop_path in _inside(block)} or {0.0} for block in found]
    for block, different in zip(found, rates, strict=True):
        if len(different) > 1:
            raise SurvivalError(
                f'survival="own": block {block.name!r} has drop paths of the rates '
                f"{', '.join(map(str, sorted(different)))}; give p_l by name"
            )
    if rates == [{0.0}] * len(found):
        raise SurvivalError(
            'survival="own": the model has no drop path with a rate above 0; build it with one '
            "(drop_path_rate=0.1), or give a rule"
        )
    return [rate for (rate,) in rates]


def _inside(block: Found) -> list[Silenced]:
    return [
        Silenced(module, attribute, rate)
        for module in block.module.modules()
        for ending, attribute in RATE.items()
        if type(module).__name__.endswith(ending)
        and isinstance(rate := getattr(module, attribute, None), float)
        and rate > 0
    ]
