"""Stochastic depth in the training loops of Lightning, transformers and accelerate.

Each module needs the library that it is named after:

    from stochastic_depth.integrations.lightning import StochasticDepth
    from stochastic_depth.integrations.transformers import StochasticDepthCallback
    from stochastic_depth.integrations.accelerate import follow

This file has what they share: the metrics that are logged, and how stochastic depth is applied
once.
"""

from contextlib import suppress
from typing import Any, Literal

from torch import nn

from stochastic_depth.draw import open_shares
from stochastic_depth.errors import ApplyError, ConfigError, GateError
from stochastic_depth.handle import Handle
from stochastic_depth.surgery import handle_of
from stochastic_depth.surgery.applied import applied_inside
from stochastic_depth.surgery.apply import apply
from stochastic_depth.survival import Survival
from stochastic_depth.tensors import replace_tensors

GatesPer = Literal["step", "pass"]
"""Whether all forward passes of an optimizer's step run under the same gates, or each draws its
own."""


def metrics(handle: Handle) -> dict[str, float]:
    """The metrics of the latest training pass, under the names by which they are logged.

        accelerator.log(metrics(handle), step=step)

    The expected depth is the sum of p_l. The realised depth is the number of blocks that ran; for
    gates of single samples, its mean over samples. The drop rate is the mean of 1 - p_l. Before the
    first training pass there is no realised depth.
    """
    expected, blocks = handle.expected_depth, len(handle.blocks)
    figures = {"expected_depth": expected, "drop_rate": 1 - expected / blocks}
    with suppress(GateError):  # nothing was drawn yet, which is so after a resume, too
        figures["realised_depth"] = open_shares(handle.gates).sum().item()
    return {f"stochastic_depth/{name}": value for name, value in figures.items()}


class Settings:
    """The settings with which a callback calls `sd.apply`, once."""

    def __init__(
        self, survival: Survival | None, gates_per: GatesPer, options: dict[str, Any]
    ) -> None:
        if gates_per not in ("step", "pass"):
            raise ConfigError(f"gates_per={gates_per!r}: choose 'step' or 'pass'")
        self.survival, self.gates_per, self.options = survival, gates_per, options

    def taken_over(self, module: nn.Module, own: Handle | None) -> Handle | None:
        """The handle of stochastic depth already applied in `module`; None if there is none.

        Args:
            own: the handle from an earlier call with these settings.

        Raises:
            ApplyError: when there are several.
        """
        inside = applied_inside(module)
        handles = [handle_of(applied) for applied in inside.values()]
        if own in handles:
            return own
        if not handles or self.survival is not None or self.options:
            return None
        if len(handles) > 1:
            raise ApplyError(
                f"stochastic depth is applied to several modules ({', '.join(map(repr, inside))}), "
                "and the callback follows one of them: call sd.apply once, on a module that "
                "contains all (stacks= counts the blocks in each part), or in Lightning give "
                "StochasticDepth(network=...) for each"
            )
        return handles[0]

    def apply(self, model: nn.Module, example: Any) -> Handle:
        """Call `sd.apply` with the settings, and with the example on the device of the model."""
        return apply(model, self.survival, example=_on_device_of(model, example), **self.options)


def _on_device_of(model: nn.Module, example: Any) -> Any:
    parameter = next(model.parameters(), None)
    if parameter is None:
        return example
    return replace_tensors(example, lambda tensor: tensor.to(parameter.device))
