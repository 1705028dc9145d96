"""A model's own drop path and layerdrop, which are disabled while stochastic depth is applied."""

import copy
import numbers
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, dataclass
from typing import Any

from torch import Tensor, nn

from stochastic_depth.errors import SurvivalError
from stochastic_depth.surgery.blocks import FoundBlock

KINDS = ("droppath", "stochasticdepth", "layerdrop", "skiplayer")
"""Parts of the names, in lower case, of classes of modules that drop branches or layers."""
RATES = ("drop_prob", "drop_path", "drop_rate", "p", "prob", "rate")
"""Names of the attributes that hold the rate of such a module, in the order in which they are
tried."""

LAYER_RATES = (
    *("layerdrop", "speech_encoder_layerdrop", "encoder_layerdrop", "decoder_layerdrop"),
    *("layer_drop", "layerdrop_prob", "layer_drop_p", "layer_drop_rate", "layer_drop_prob"),
    *("stochastic_depth_rate", "p_layer_drop", "layer_dropout_rate", "stochastic_depth_prob"),
)
"""Names of attributes that hold a layerdrop rate, with which a loop over layers skips whole
layers."""

ELSEWHERE = (
    "its drop path {!r} is also called where nothing is skipped, and must go on dropping there: "
    "give that place a drop path of its own, or set the rate of this one to 0"
)
"""The refusal of a block whose drop path other code calls too, to be given the drop path's name."""


@dataclass(frozen=True)
class ChangedSetting:
    """A drop rate, or a similar setting of a module, which stochastic depth changes."""

    module: nn.Module
    attribute: str
    original: Any
    """The value of the setting without stochastic depth."""
    value: Any = 0.0
    """The value while stochastic depth is applied."""

    def change(self) -> None:
        """Change the setting."""
        setattr(self.module, self.attribute, self.value)

    def restore(self) -> None:
        """Restore the original value."""
        setattr(self.module, self.attribute, self.original)


class ChangedConfig:
    """A configuration in which stochastic depth sets layerdrop rates to 0.

    It may be shared with other models, so this model gets a changed copy.

    Args:
        holders: the modules of this model that share the configuration, each with the name of its
            attribute.
        rates: the names of the rates.
    """

    def __init__(
        self, original: Any, holders: Sequence[tuple[nn.Module, str]], rates: Sequence[str]
    ) -> None:
        self.original, self.holders, self.rates = original, holders, rates
        self.copy = copy.copy(original)
        for rate in rates:
            _set(self.copy, rate, 0.0)
        self.at_first = dict(getattr(self.copy, "__dict__", {}))

    def change(self) -> None:
        """Give the modules the changed copy."""
        for holder, attribute in self.holders:
            setattr(holder, attribute, self.copy)

    def restore(self) -> None:
        """Give the modules the original; it gets what was set on the copy meanwhile."""
        for name, value in getattr(self.copy, "__dict__", {}).items():
            first = self.at_first.get(name, self)
            # A pickle keeps the identity of objects, but not that of numbers.
            same = value is first or (isinstance(value, int | float) and value == first)
            if not same and name not in self.rates:
                _set(self.original, name, value)
        for holder, attribute in self.holders:
            if getattr(holder, attribute, None) is self.copy:
                setattr(holder, attribute, self.original)


def _set(config: Any, name: str, value: object) -> None:
    try:
        setattr(config, name, value)
    except FrozenInstanceError:
        object.__setattr__(config, name, value)


Changed = ChangedSetting | ChangedConfig


def disable_drop_paths(model: nn.Module, found: Sequence[FoundBlock]) -> list[Changed]:
    """Set the drop paths inside the blocks, and the layerdrop around them, to rate 0.

    PyTorch's own transformer layers are also kept from computing a whole layer in one fused call,
    because blocks inside that call could not be skipped.
    """
    drop_paths = (drop_path for block in found for drop_path in _inside(model, block))
    changed: list[Changed] = [*drop_paths, *_around(model, found), *_fused(model, found)]
    for each in changed:
        each.change()
    return changed


def drop_paths_of(model: nn.Module, found: Sequence[FoundBlock]) -> dict[nn.Module, FoundBlock]:
    """The drop paths of the blocks whose rate is above 0, each with a block that has it.

    Without those whose own code adds: they are called while their block is closed, too.
    """
    adding = {module for block in found for unit in block.units for module, _ in unit.edits}
    return {
        drop_path.module: block
        for block in found
        for drop_path in _inside(model, block)
        if adding.isdisjoint(drop_path.module.modules())
    }


def own_rates(model: nn.Module, found: Sequence[FoundBlock]) -> list[float]:
    """The drop rate of each block's own drop path; 0 if it has none.

    Raises:
        SurvivalError: when the drop paths of one block have different rates, or no block has a rate
            above 0.
    """
    rates = [
        {_round(drop_path.original) for drop_path in _inside(model, block)} or {0.0}
        for block in found
    ]
    for block, different in zip(found, rates, strict=True):
        if len(different) > 1:
            raise SurvivalError(
                f'survival="own": block {block.name!r} has drop paths of the rates '
                f"{', '.join(map(str, sorted(different)))}; give survival as a mapping from "
                "the names of blocks to p_l"
            )
    if rates == [{0.0}] * len(found):
        raise SurvivalError(
            'survival="own": the model has no drop path with a rate above 0; build it with one '
            "(drop_path_rate=0.1), or give a rule. Found are modules inside a block whose class is "
            "named like DropPath, StochasticDepth or LayerDrop; if yours is a function such as "
            "drop_path(x, rate, self.training), set its rates to 0 and give them here: "
            "survival=[1 - rate, ...]"
        )
    return [rate for (rate,) in rates]


def _round(rate: Any) -> float:
    """A rate as it was written, such as 0.1, even if it was stored in single precision."""
    return float(rate) if isinstance(rate, float) else float(f"{float(rate):.6g}")


def _around(model: nn.Module, found: Sequence[FoundBlock]) -> list[Changed]:
    """The layerdrop settings of the modules around the blocks, and of their configurations."""
    paths = [block.name.split(".") for block in found]
    above = {".".join(path[:length]) for path in paths for length in range(len(path))}
    around = [module for name, module in model.named_modules() if name in above]
    changed: list[Changed] = [
        ChangedSetting(module, attribute, rate)
        for module in around
        for attribute in filter(None, (*LAYER_RATES, _rate_of(module)))
        if is_rate(rate := getattr(module, attribute, None))
    ]
    configs = {id(c): c for m in around if (c := getattr(m, "config", None)) is not None}
    for config in configs.values():
        rates = [each for each in LAYER_RATES if is_rate(getattr(config, each, None))]
        if rates:
            # Modules that forward it, or have a property that does, follow these.
            sharing = [
                (m, name) for m in model.modules() for name, v in vars(m).items() if v is config
            ]
            sharing += [(m, "config") for m in around if getattr(type(m), "config", None) is config]
            changed.append(ChangedConfig(config, sharing, rates))
    return changed


def _inside(model: nn.Module, block: FoundBlock) -> list[ChangedSetting]:
    """The drop paths inside a block, or that its branches call, whose rate is above 0."""
    called = map(model.get_submodule, block.names_in_branch())  # the trunk may have them in a list
    return [
        ChangedSetting(module, attribute, rate)
        for module in dict.fromkeys([*block.module.modules(), *called])
        if (attribute := _rate_of(module)) and is_rate(rate := getattr(module, attribute))
    ]


def _fused(model: nn.Module, found: Sequence[FoundBlock]) -> list[ChangedSetting]:
    """The settings that let PyTorch's encoder layers, and stacks of them, use their fused path."""
    holders = {block.module for block in found}
    holders |= {module for block in found for unit in block.units for module, _ in unit.edits}
    changed_settings = []
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and module in holders:
            now = module.activation_relu_or_gelu
            changed_settings.append(ChangedSetting(module, "activation_relu_or_gelu", now, 0))
        elif isinstance(module, nn.TransformerEncoder) and holders & set(module.modules()):
            now = module.use_nested_tensor
            changed_settings.append(ChangedSetting(module, "use_nested_tensor", now, False))
    return changed_settings


def _rate_of(module: nn.Module) -> str | None:
    """The name of the attribute that holds the rate, if `module` drops branches or layers."""
    name = type(module).__name__.lower().replace("_", "")
    if not any(kind in name for kind in KINDS):
        return None
    return next((name for name in RATES if is_number(getattr(module, name, None))), None)


def is_number(value: Any) -> bool:
    """Whether `value` is a single number, of Python, NumPy or PyTorch."""
    if isinstance(value, bool) or value is None:
        return False
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, numbers.Real)


def is_rate(value: Any) -> bool:
    """Whether `value` is a single number above 0."""
    return is_number(value) and float(value) > 0
