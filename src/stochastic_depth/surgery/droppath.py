"""A model's own drop path and layerdrop, which stochastic depth takes over: never both at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from stochastic_depth.errors import SurvivalError
from stochastic_depth.surgery.find import Found

RATE = {"DropPath": "drop_prob", "StochasticDepth": "p"}
"""The attribute with the drop rate, by how the name of the class ends."""

LAYER_RATES = ("layerdrop", "speech_encoder_layerdrop")
"""Attributes with the rate at which transformers leaves whole layers out."""


@dataclass(frozen=True)
class Silenced:
    """A rate that is 0 as long as stochastic depth is applied."""

    holder: Any
    """The drop path; or what loops over the layers, or its configuration."""
    attribute: str
    rate: float

    def restore(self) -> None:
        setattr(self.holder, self.attribute, self.rate)


def silence(model: nn.Module, found: Sequence[Found]) -> list[Silenced]:
    """Set the rates of the drop paths inside of the blocks, and of layerdrop around them, to 0."""
    silenced = [drop_path for block in found for drop_path in _inside(block)]
    silenced += _around(model, found)
    for each in silenced:
        setattr(each.holder, each.attribute, 0.0)
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


def _around(model: nn.Module, found: Sequence[Found]) -> list[Silenced]:
    holders = {
        id(holder): holder
        for name, module in model.named_modules()
        if any(not name or block.name.startswith(f"{name}.") for block in found)
        for holder in (module, getattr(module, "config", None))
    }
    return [
        Silenced(holder, attribute, rate)
        for holder in holders.values()
        for attribute in LAYER_RATES
        if isinstance(rate := getattr(holder, attribute, None), float) and rate > 0
    ]


def _inside(block: Found) -> list[Silenced]:
    return [
        Silenced(module, attribute, rate)
        for module in block.module.modules()
        for ending, attribute in RATE.items()
        if type(module).__name__.endswith(ending)
        and isinstance(rate := getattr(module, attribute, None), float)
        and rate > 0
    ]
