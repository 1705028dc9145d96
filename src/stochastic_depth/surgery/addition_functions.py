"""PyTorch's functions that add, and how they are called."""

from collections.abc import Mapping
from typing import Any, Literal

Side = Literal[0, 1]
"""Which of the two operands of an addition is its shortcut."""

ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__", "addcmul", "addcmul_"}
"""Names of PyTorch's functions that add."""

ADD_IN_PLACE = {"add_", "__iadd__", "addcmul_"}
"""Those that change their first operand."""


def scales_second(name: str, others: Mapping[str, Any]) -> bool:
    """Whether an addition scales its second operand, as `torch.add(x, y, alpha=2)` does.

    Args:
        name: the name of the function; the result is False if it is not one of `ADDITIONS`.
        others: the arguments other than the operands.
    """
    return name in ADDITIONS and (name.startswith("addcmul") or others.get("alpha", 1) != 1)


def by_position(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The operands of an addition, also if given by name; and its other arguments."""
    others = dict(kwargs)
    first = (others.pop("input"),) if "input" in others else ()
    last = [others.pop(name) for name in ("other", "tensor1", "tensor2") if name in others]
    return (*first, *args, *last), others
