"""The settings of gates, each checked against the others."""

from dataclasses import dataclass
from typing import get_args

from stochastic_depth.choices import Closed, GateKind, Scale, SkippedPolicy
from stochastic_depth.errors import ApplyError
from stochastic_depth.numbers import whole_number


@dataclass(frozen=True)
class GateSettings:
    """How gates are drawn, and what they do; `sd.apply` explains each setting.

    Raises:
        ApplyError: when a setting has an unknown value, or two settings conflict.
    """

    gate: GateKind = "batch"
    min_samples: int = 0
    balance: bool = False
    multiple_of: int = 1
    closed: Closed = "skipped"
    scale: Scale = "inference"
    skipped: SkippedPolicy = "paper"

    def __post_init__(self) -> None:
        require_choice("gate", self.gate, get_args(GateKind))
        require_choice("closed", self.closed, get_args(Closed))
        require_choice("skipped", self.skipped, get_args(SkippedPolicy))
        require_choice("balance", self.balance, (True, False))
        object.__setattr__(self, "balance", bool(self.balance))
        if self.closed == "skipped":
            require_choice("scale", self.scale, ("inference", "training"))
        elif self.gate != "batch":
            raise ApplyError(
                f'closed="forward-only" needs gate="batch", this is gate="{self.gate}": '
                "forward-only blocks are drawn per mini-batch"
            )
        elif self.scale != "none":
            raise ApplyError(
                f'scale="{self.scale}" with closed="forward-only": every branch is added in every '
                "step, so there is no expectation to correct; leave scale out"
            )
        for name, least in (("min_samples", 0), ("multiple_of", 1)):
            number = whole_number(getattr(self, name))
            if number is None or number < least:
                raise ApplyError(
                    f"{name}={getattr(self, name)!r}: give a number of samples, {least} or more"
                )
            object.__setattr__(self, name, number)
        if self.min_samples > 0 and self.gate != "subset":
            raise ApplyError(
                f'min_samples={self.min_samples} needs gate="subset", this is gate="{self.gate}": '
                "leave it out, or choose the subset gate"
            )
        if self.multiple_of > 1 and not (self.balance and self.gate == "subset"):
            raise ApplyError(
                f'multiple_of={self.multiple_of} needs gate="subset" and balance=True, this is '
                f'gate="{self.gate}" and balance={self.balance}'
            )


def require_choice(option: str, value: object, known: tuple[object, ...]) -> None:
    """Raise `ApplyError` unless `value` is one of `known`."""
    if value not in known:
        raise ApplyError(f"{option}={value!r}: choose one of {', '.join(map(repr, known))}")
