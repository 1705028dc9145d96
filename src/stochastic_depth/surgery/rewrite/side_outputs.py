"""Tell the variables that a method uses from those that it only hands out.

A closed branch does not compute its side outputs, such as attention weights: they are None. That
changes nothing else if the method only hands them out, and does nothing else that depends on it.
"""

import ast
from collections.abc import Sequence

from stochastic_depth.surgery.rewrite.variables import defines, surely_defines, uses

Used = frozenset[str]
"""The variables that are used for more than to be handed out; and `_WORK`."""

_WORK = "<work>"
"""Is among `Used` if code does more than to hand out variables."""


def used_before(statement: ast.stmt, used: Used) -> Used:
    """The variables that code from `statement` on uses for more than to hand them out.

    A variable is only handed out if it is returned, or put in a tuple, list or dictionary that is
    only handed out. It may be compared with None to decide what to hand out.

    Args:
        used: the same for the code after the statement.
    """
    match statement:
        case ast.Pass():
            return used
        case ast.Return():
            return _used_in(statement.value)
        case ast.Assign():
            return _used_by_assignment(statement, statement.targets, used)
        case ast.AnnAssign():
            return _used_by_assignment(statement, [statement.target], used)
        case ast.AugAssign(target=ast.Name(id=name)) if _is_sequence(statement.value):
            more = uses(statement) | {_WORK} if name in used else _used_in(statement.value)
            return used | more
        case ast.If():
            arms = [_used_before_all(arm, used) for arm in (statement.body, statement.orelse)]
            return arms[0] | arms[1] | used_by_test(statement, used)
        case _:
            return used | uses(statement) | {_WORK}


def used_by_test(statement: ast.If, used: Used) -> Used:
    """The variables that a condition uses itself; `used` as for `used_before`."""
    compared = _compared_with_none(statement.test)
    returns = any(isinstance(node, ast.Return) for node in ast.walk(statement))
    after = used if returns else used - {_WORK}
    arms = [
        _used_before_all([part for part in arm if not defines(part) & compared], after)
        for arm in (statement.body, statement.orelse)
    ]
    return _used_in_test(statement.test, decides=_WORK in arms[0] | arms[1])


def _used_before_all(statements: Sequence[ast.stmt], used: Used) -> Used:
    for statement in reversed(statements):
        used = used_before(statement, used)
    return used


def _used_by_assignment(
    statement: ast.Assign | ast.AnnAssign, targets: Sequence[ast.expr], used: Used
) -> Used:
    kept = used - surely_defines(statement)
    of_targets = frozenset[str]().union(*map(uses, targets))
    to_names = all(isinstance(target, ast.Name) for target in targets)
    if to_names and defines(statement).isdisjoint(used):
        return kept | _used_in(statement.value)
    return kept | of_targets | _all_in(statement.value)


def _used_in(value: ast.expr | None) -> Used:
    """The variables that an expression uses, if its value is only handed out."""
    match value:
        case None | ast.Name() | ast.Constant():
            return frozenset()
        case ast.Tuple() | ast.List():
            return frozenset[str]().union(*map(_used_in, value.elts))
        case ast.Dict():
            keys = (uses(key) for key in value.keys if key is not None)
            return frozenset[str]().union(*keys, *map(_used_in, value.values))
        case ast.Starred():
            return _used_in(value.value)
        case ast.BinOp() if _is_sequence(value):
            return _used_in(value.left) | _used_in(value.right)
        case ast.IfExp():
            arms = _used_in(value.body) | _used_in(value.orelse)
            return arms | _used_in_test(value.test, decides=_WORK in arms)
        case _:
            return _all_in(value)


def _all_in(value: ast.expr | None) -> Used:
    return frozenset() if value is None else uses(value) | {_WORK}


def _used_in_test(test: ast.expr, decides: bool) -> Used:
    """The variables that a condition uses.

    Args:
        decides: whether more depends on it than what is handed out.
    """
    match test:
        case ast.BoolOp():
            return frozenset[str]().union(*(_used_in_test(part, decides) for part in test.values))
        case ast.UnaryOp(op=ast.Not()):
            return _used_in_test(test.operand, decides)
        case _ if not decides and _compared_with_none(test):
            return frozenset()
        case _:
            return uses(test)


def _compared_with_none(test: ast.expr) -> frozenset[str]:
    """The variables that a condition compares with None."""
    return frozenset(
        node.left.id
        for node in ast.walk(test)
        if isinstance(node, ast.Compare)
        and isinstance(node.left, ast.Name)
        and isinstance(node.ops[0], ast.Is | ast.IsNot)
        and isinstance(node.comparators[0], ast.Constant)
        and node.comparators[0].value is None
    )


def _is_sequence(value: ast.expr) -> bool:
    """Whether an expression is a tuple or list, or a sum of which a part is one."""
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        return _is_sequence(value.left) or _is_sequence(value.right)
    return isinstance(value, ast.Tuple | ast.List)
