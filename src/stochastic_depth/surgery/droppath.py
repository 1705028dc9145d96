"""A model's own drop path and layerdrop, which are disabled while stochastic depth is applied."""

import copy
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class ChangedSetting:
    """A drop rate, or a similar setting, that is changed while stochastic depth is applied.

    A configuration object may be shared with other models, so this model gets a changed copy.
    """

    holders: tuple[Any, ...]
    """The module with the setting; or all modules that share the configuration with the setting."""
    attribute: str
    original: Any
    """The value of the setting without stochastic depth."""
    value: Any = 0.0
    """The value while stochastic depth is applied."""
    in_config: bool = False
    """Whether the setting is in the `config` of the holders."""

    def change(self) -> None:
        """Change the setting."""
        if not self.in_config:
            setattr(self.holders[0], self.attribute, self.value)
            return
        copied = copy.copy(self.holders[0].config)
        setattr(copied, self.attribute, self.value)
        for holder in self.holders:
            holder.config = copied

    def restore(self) -> None:
        """Restore the original value."""
        holder = self.holders[0].config if self.in_config else self.holders[0]
        setattr(holder, self.attribute, self.original)


def disable_drop_paths(model: nn.Module, found: Sequence[FoundBlock]) -> list[ChangedSetting]:
    """Set the drop paths inside the blocks, and the layerdrop around them, to rate 0.

    PyTorch's own transformer layers are also kept from computing a whole layer in one fused call,
    because blocks inside that call could not be skipped.
    """
    changed_settings = [drop_path for block in found for drop_path in _inside(block)]
    changed_settings += [*_around(model, found), *_fused(model, found)]
    for each in changed_settings:
        each.change()
    return changed_settings


def own_rates(found: Sequence[FoundBlock]) -> list[float]:
    """The drop rate of each block's own drop path; 0 if it has none.

    Raises:
        SurvivalError: when the drop paths of one block have different rates, or no block has a rate
            above 0.
    """
    rates = [
        {_round(drop_path.original) for drop_path in _inside(block)} or {0.0} for block in found
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
            "(drop_path_rate=0.1), or give a rule"
        )
    return [rate for (rate,) in rates]


def _round(rate: Any) -> float:
    """A rate as it was written, such as 0.1, even if it was stored in single precision."""
    return float(rate) if isinstance(rate, float) else float(f"{float(rate):.6g}")


def _around(model: nn.Module, found: Sequence[FoundBlock]) -> list[ChangedSetting]:
    """The layerdrop settings of the modules around the blocks, and of their configurations."""
    paths = [block.name.split(".") for block in found]
    above = {".".join(path[:length]) for path in paths for length in range(len(path))}
    around = [module for name, module in model.named_modules() if name in above]
    changed_settings = [
        ChangedSetting((module,), attribute, rate)
        for module in around
        for attribute in filter(None, (*LAYER_RATES, _rate_of(module)))
        if is_rate(rate := getattr(module, attribute, None))
    ]
    configs = {id(c): c for m in around if (c := getattr(m, "config", None)) is not None}
    for config in configs.values():
        sharing = tuple(m for m in model.modules() if getattr(m, "config", None) is config)
        changed_settings += [
            ChangedSetting(sharing, attribute, rate, in_config=True)
            for attribute in LAYER_RATES
            if is_rate(rate := getattr(config, attribute, None))
        ]
    return changed_settings


def _inside(block: FoundBlock) -> list[ChangedSetting]:
    """The drop paths inside a block whose rate is above 0."""
    return [
        ChangedSetting((module,), attribute, rate)
        for module in block.module.modules()
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
            changed_settings.append(ChangedSetting((module,), "activation_relu_or_gelu", now, 0))
        elif isinstance(module, nn.TransformerEncoder) and holders & set(module.modules()):
            now = module.use_nested_tensor
            changed_settings.append(ChangedSetting((module,), "use_nested_tensor", now, False))
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
