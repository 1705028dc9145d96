"""Numbers that a user gives, from any library."""

import operator
from numbers import Real
from typing import Any


def whole_number(value: object) -> int | None:
    """An integer of any library as a Python integer; None for anything else, such as a bool."""
    if isinstance(value, bool):
        return None
    given: Any = value
    try:
        return operator.index(given)
    except TypeError:
        return None


def real_number(value: object) -> float | None:
    """A real number of any library as a Python float; None for anything else, such as a bool."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return float(value)
