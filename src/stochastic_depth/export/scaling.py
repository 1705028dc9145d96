"""Which weights to multiply so that a branch's output is multiplied by p, and nothing else changes.

Every value of a forward pass gets an exponent e: it is to become p^e times what it was. That of the
branch's output is 1, that of all that is no part of the branch 0, and every operation relates those
of its arguments to that of its result. Looked for from the output backwards, as near to it as can
be. A value that is used besides, as by squeeze and excitation, is made up for where it is used.
"""

from collections.abc import Sequence

from stochastic_depth.export.homogeneity import addends, factors, form_of, others
from stochastic_depth.export.tracing import Scaled, Value, ancestors

Exponents = dict[Value, int]


class Inexact(Exception):
    """No weights can be multiplied; says what is in the way."""


def exponents(scaled: Sequence[Scaled]) -> dict[str, int]:
    """By name, of the tensors of the `state_dict` that are to be multiplied.

    Args:
        scaled: the outputs of the branches that one factor is for.

    Raises:
        Inexact: when there is no way.
    """
    found: Exponents = {}
    inside: set[Value] = set()
    ends: set[Value] = set()
    for each in scaled:
        shortcuts = [v for user in each.product.users for v in user.operands()]
        around = ancestors([v for v in shortcuts if v is not each.product])
        branch, whole = _branch(each.branch, around)
        inside |= ancestors([branch]) - around
        ends |= {each.product, *whole}
        found = _demand(branch, 1, found, inside)
    for value in list(found):
        _settle(value, found, inside, ends)
    return {value.state: e for value, e in found.items() if value.state and e}


def _branch(value: Value, around: set[Value]) -> tuple[Value, list[Value]]:
    """What is added to the shortcut; where it was given as a sum less the shortcut, the sum too."""
    if value.operation == "sub":
        whole, shortcut = value.arguments["self"], value.arguments["other"]
        if shortcut in around and isinstance(whole, Value) and whole.operation == "add":
            parts = [part for part in whole.operands() if part is not shortcut]
            if len(parts) == 1:
                return parts[0], [whole, value]
    return value, []


def _demand(value: Value, e: int, found: Exponents, inside: set[Value]) -> Exponents:
    """`found`, and what makes the exponent of `value` e.

    Args:
        inside: the values of the branch, which may change, as those of the `state_dict` may.
    """
    if value in found:
        if found[value] != e:
            raise Inexact(f"{_named(value)} would have to change in two ways")
        return found
    if value.state:
        return {**found, value: e}
    if not value.operation or (not _is_fixed(value) and value not in inside):
        raise Inexact("no weight is multiplied into it linearly")
    form = form_of(value)
    if form is None:
        raise Inexact(f"it passes through {_named(value)}, which is not linear")
    found = {**found, value: e}
    for addend in addends(value, form):
        found = _demand(addend, e, found, inside)
    reasons: list[str] = []
    choices = sorted(factors(value, form), key=lambda f: (f not in found, not _is_fixed(f)))
    for factor in choices:
        try:
            return _demand(factor, e, found, inside)
        except Inexact as error:
            reasons.append(str(error))
    if choices:
        raise Inexact(reasons[-1])
    return found


def _settle(origin: Value, found: Exponents, inside: set[Value], ends: set[Value]) -> None:
    """Follow a value that changes to all that uses it, and make up for it there."""
    ahead = [origin]
    while ahead:
        value = ahead.pop()
        for user in value.users:
            if user in ends:
                continue
            before = set(found)
            if user not in inside or not _agrees(user, value, found):
                raise Inexact(f"{_named(origin)} is used for something else too, by {_named(user)}")
            ahead += [new for new in found if new not in before]


def _agrees(user: Value, value: Value, found: Exponents) -> bool:
    """Whether `user` is right as it is, or can be: itself or another factor is given its due."""
    form = form_of(user)
    if form is None or value in others(user, form):
        return False
    of_factors = factors(user, form)
    total = sum(found.get(factor, 0) for factor in of_factors)
    wanted = {found.get(addend, 0) for addend in addends(user, form)}
    if user in found or wanted - {0} or not of_factors:
        right = found.get(user, 0)
        return not wanted - {right} and (not of_factors or total == right)
    if total == 0:
        return True
    free = [factor for factor in of_factors if factor not in found and _is_fixed(factor)]
    if free:
        found.update(_demand(free[0], -total, found, set()))
    else:
        found[user] = total
    return True


def _is_fixed(value: Value) -> bool:
    """Whether it is computed from nothing but the `state_dict`."""
    parts = list(value.operands())
    return bool(value.state) or (bool(value.operation) and all(map(_is_fixed, parts)))


def _named(value: Value) -> str:
    return repr(value.state) if value.state else value.operation or "an input"
