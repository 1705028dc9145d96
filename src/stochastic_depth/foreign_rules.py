"""The survival rules of other libraries, by name.

The same numbers lead to the same p_l. Those libraries use drop rates, 1 - p_l, and most of them
count blocks from 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from stochastic_depth.errors import SurvivalError
from stochastic_depth.numbers import real_number

Shape = Callable[[int, int], float]
"""The share of the full drop rate in block n, counted from 0, of L blocks."""


def _to_the_last(n: int, blocks: int) -> float:
    return n / (blocks - 1) if blocks > 1 else 0.0


def _to_the_last_or_all(shape: Callable[[float, int], float]) -> Shape:
    """The scale of torchtune: the last block has the full rate, even if it is the only block."""

    def scale(n: int, blocks: int) -> float:
        period = blocks - 1
        return 1.0 if n >= period else min(max(shape(n / period, period), 0.0), 1.0)

    return scale


SHAPES: dict[str, Shape] = {
    "timm": _to_the_last,
    "timm-stagewise": _to_the_last,
    "torchvision": lambda n, blocks: n / blocks,
    "torchvision-last": _to_the_last,
    "fairseq": lambda n, blocks: 1.0,
    "transformers": lambda n, blocks: 1.0,
    "composer": lambda n, blocks: (n + 1) / blocks,
    "composer-uniform": lambda n, blocks: 1.0,
    "deepspeed": lambda n, blocks: (n + 1) / blocks,
    "torchtune": lambda n, blocks: 1.0,
    "torchtune-linear": _to_the_last_or_all(lambda t, period: t),
    "torchtune-exp": _to_the_last_or_all(lambda t, period: 2**t - 1),
    "torchtune-log": _to_the_last_or_all(lambda t, period: math.log(t * period + 1, period + 1)),
    "torchtune-sin": _to_the_last_or_all(lambda t, period: math.sin(0.5 * math.pi * t)),
    "torchtune-sigmoid": _to_the_last_or_all(lambda t, period: 1 / (1 + math.exp(-10 * (t - 0.5)))),
}


@dataclass(frozen=True)
class NamedRule:
    """p_l = 1 - rate * shape(l - 1, L)."""

    name: str
    rate: float

    def __post_init__(self) -> None:
        if self.name not in SHAPES:
            raise SurvivalError(
                f"there is no survival rule {self.name!r}: choose one of {', '.join(SHAPES)}"
            )
        rate = real_number(self.rate)
        if rate is None or not 0 <= rate < 1:
            raise SurvivalError(
                f"survival_rule({self.name!r}, {self.rate!r}): it is a drop rate, which must be a "
                "number, at least 0 and below 1"
            )

    def __call__(self, block: int, blocks: int) -> float:
        return 1 - self.rate * SHAPES[self.name](block - 1, blocks)


def survival_rule(name: str, rate: float) -> NamedRule:
    """The survival rule of another library.

    If a model of timm or torchvision was built with a drop rate, each of its blocks knows its own
    rate, and `survival="own"` of `sd.apply` takes it from there. That is exact even where the
    library counts blocks that are not residual (EfficientNet).

    Args:
        name: one of these names.
            "timm": `drop_path_rate` of most models, 0 in the first block and `rate` in the last.
            "timm-stagewise": `calculate_drop_path_rates(stagewise=True)`, the same numbers cut into
            stages.
            "torchvision": `stochastic_depth_prob` of EfficientNet, rate * n / L with n from 0.
            "torchvision-last": the same of ConvNeXt and Swin, which reaches `rate` in the last
            block.
            "fairseq", "transformers": `LayerDropModuleList` and `layerdrop`, the same in every
            block.
            "composer", "composer-uniform": `drop_distribution`, "linear" (as in the paper) or
            "uniform".
            "deepspeed": progressive layer dropping, where theta is 1 - rate.
            "torchtune": `prob_max` of `prepare_layer_dropout`; its `prob_layer_scale` follows a
            hyphen: "torchtune-linear", -exp, -log, -sin, -sigmoid.
        rate: the drop rate, in [0, 1).

    Raises:
        SurvivalError: when the name is not known, or the rate is outside [0, 1).

    Examples:
        >>> rule = sd.survival_rule("timm", 0.3)
        >>> [round(rule(block, 4), 3) for block in (1, 2, 3, 4)]
        [1.0, 0.9, 0.8, 0.7]
    """
    return NamedRule(name, rate)
