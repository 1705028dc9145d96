"""The survival rules of other libraries, by name: the same p_l from the same numbers.

Those libraries speak of drop rates, 1 - p_l, and most count blocks from 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from stochastic_depth.errors import SurvivalError

Shape = Callable[[int, int], float]
"""The share of the full drop rate that block n, counted from 0, of L has."""


def _to_the_last(n: int, blocks: int) -> float:
    return n / (blocks - 1) if blocks > 1 else 0.0


def _to_the_last_or_all(shape: Callable[[float, int], float]) -> Shape:
    """torchtune's scale: the last block has the full rate, also where it is the only block."""

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
        if not 0 <= self.rate < 1:
            raise SurvivalError(
                f"survival_rule({self.name!r}, {self.rate}): it is a drop rate, which must be "
                "at least 0 and below 1"
            )

    def __call__(self, block: int, blocks: int) -> float:
        return 1 - self.rate * SHAPES[self.name](block - 1, blocks)


def survival_rule(name: str, rate: float) -> NamedRule:
    """The survival rule of another library.

    A model of timm's or torchvision's that was built with a rate has it in its blocks, and
    `survival="own"` of `sd.apply` takes it from there. That is exact also where the library counts
    blocks that are not residual (EfficientNet).

    Args:
        name: "timm": `drop_path_rate` of most models, 0 in the first block and the rate in the
            last; "timm-stagewise": of `calculate_drop_path_rates(stagewise=True)`, the same numbers
            cut into stages; "torchvision": `stochastic_depth_prob` of EfficientNet, rate * n / L
            with n from 0; "torchvision-last": that of ConvNeXt and Swin, which reaches the rate;
            "fairseq": of `LayerDropModuleList`, "transformers": `layerdrop`, both the same in every
            block; "composer": `drop_distribution` "linear", as in the paper, "composer-uniform":
            the other; "deepspeed": progressive layer dropping, whose theta is 1 - rate;
            "torchtune": `prob_max` of `prepare_layer_dropout`, with a `prob_layer_scale` after a
            hyphen ("torchtune-linear", -exp, -log, -sin, -sigmoid).
        rate: the drop rate, in [0, 1).

    Raises:
        SurvivalError: when the name is not known, or the rate is outside [0, 1).

    Examples:
        >>> rule = sd.survival_rule("timm", 0.3)
        >>> [round(rule(block, 4), 3) for block in (1, 2, 3, 4)]
        [1.0, 0.9, 0.8, 0.7]
    """
    return NamedRule(name, rate)
