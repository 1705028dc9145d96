"""Checks of settings and options: an error names the setting, its value and what is right."""

import math

from stochastic_depth.errors import ConfigError

MOST = 10**9
"""The largest count that is accepted. A larger one is a typing error, and the product of two
accepted counts fits into 64 bits."""


def check_that(holds: bool, name: str, value: object, right: str) -> None:
    """Raise an error for a setting that does not hold.

    Raises:
        ConfigError: naming the setting, its value, and what would be right.
    """
    if not holds:
        raise ConfigError(f"{name} is {value}: it must be {right}")


def at_least(minimum: int, **values: int | None) -> None:
    """`check_that` that numbers are not below `minimum`; their names are those of options."""
    for name, value in values.items():
        option = f"--{name.replace('_', '-')}"
        check_that(value is None or value >= minimum, option, value, f"at least {minimum}")


def check_probability(name: str, value: float) -> None:
    """`check_that` a survival probability is in (0, 1]."""
    check_that(0 < value <= 1, name, value, "above 0 and at most 1")


def positive(name: str, value: int | None) -> None:
    """`check_that` a count, where there is one, is from 1 to `MOST`."""
    check_that(value is None or value >= 1, name, value, "at least 1")
    check_that(value is None or value <= MOST, name, value, f"at most {MOST:,}")


def finite(where: str, config: object) -> None:
    """`check_that` no number of a part of the configuration, `where`, is infinite or NaN."""
    for name, value in vars(config).items():
        if isinstance(value, float):
            name = f"{where}.{name.replace('_', '-')}"
            check_that(math.isfinite(value), name, value, "finite")
