"""Which variables an expression or statement uses, and which it sets."""

import ast
from collections.abc import Iterator


def only_assigns(statement: ast.stmt) -> bool:
    """Whether a statement does nothing but set or change variables."""
    if isinstance(statement, ast.If | ast.For | ast.While):
        return all(map(only_assigns, [*statement.body, *statement.orelse]))
    if isinstance(statement, ast.Pass | ast.Break | ast.Continue):
        return True
    if isinstance(statement, ast.Assign):
        return all(map(_are_variables, statement.targets))
    if isinstance(statement, ast.Expr):
        return changed_in_place(statement) is not None
    return isinstance(statement, ast.AugAssign | ast.AnnAssign) and _are_variables(statement.target)


def changed_in_place(node: ast.AST) -> str | None:
    """The variable that a statement such as `x.mul_(...)` or `x.append(...)` changes, or None."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        function = node.value.func
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            changes = function.attr.endswith("_") or function.attr in ("append", "extend")
            return function.value.id if changes else None
    return None


def _are_variables(target: ast.expr) -> bool:
    """Whether `target` is a variable, an item of one (`y[i]`), or a tuple of them."""
    if isinstance(target, ast.Tuple | ast.List):
        return all(map(_are_variables, target.elts))
    return isinstance(target, ast.Name) or _of_item(target) is not None


def _of_item(target: ast.AST) -> str | None:
    """The variable of which `target` is an item (`y[i]`, `y[i][j]`), or None."""
    is_item = False
    while isinstance(target, ast.Subscript):
        is_item, target = True, target.value
    return target.id if is_item and isinstance(target, ast.Name) else None


def uses(node: ast.AST) -> frozenset[str]:
    """The variables whose values a node may need."""
    names = {n.id for n in _names(node) if isinstance(n.ctx, ast.Load)}
    changed = (n.target for n in ast.walk(node) if isinstance(n, ast.AugAssign))
    return frozenset(names | {target.id for target in changed if isinstance(target, ast.Name)})


def conditional_uses(node: ast.AST) -> tuple[frozenset[str], dict[str, list[ast.expr]]]:
    """The variables that a node always needs, and those it needs under some conditions."""
    found: dict[str, list[list[ast.expr]]] = {}

    def visit(node: ast.AST, tests: list[ast.expr]) -> None:
        if isinstance(node, ast.IfExp) and is_steady(node.test):
            visit(node.test, tests)
            for name in uses(node.body) & uses(node.orelse):
                found.setdefault(name, []).append(tests)
            visit(node.body, [*tests, node.test])
            visit(node.orelse, [*tests, ast.UnaryOp(ast.Not(), node.test)])
            return
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            found.setdefault(node.id, []).append(tests)
        for child in ast.iter_child_nodes(node):
            visit(child, tests)

    visit(node, [])
    always = (uses(node) - found.keys()) | {name for name, each in found.items() if [] in each}
    return frozenset(always), {
        name: [tests[0] if len(tests) == 1 else ast.BoolOp(ast.And(), tests) for tests in each]
        for name, each in found.items()
        if name not in always
    }


def defines(node: ast.AST) -> frozenset[str]:
    """The variables that a node may set or change."""
    loops = (n.target for n in ast.walk(node) if isinstance(n, ast.comprehension))
    of_comprehensions = {id(name) for target in loops for name in _names(target)}
    stored = (n for n in _names(node) if isinstance(n.ctx, ast.Store))
    changed = (name for n in ast.walk(node) if (name := changed_in_place(n)) is not None)
    items = (n for n in ast.walk(node) if isinstance(getattr(n, "ctx", None), ast.Store))
    filled = (name for n in items if (name := _of_item(n)) is not None)
    names = (n.id for n in stored if id(n) not in of_comprehensions)
    return frozenset([*names, *changed, *filled])


def surely_defines(statement: ast.stmt) -> frozenset[str]:
    """The variables that certainly have a new value after a statement."""
    if isinstance(statement, ast.If):
        both = [
            frozenset[str]().union(*map(surely_defines, part))
            for part in (statement.body, statement.orelse)
        ]
        return both[0] & both[1]
    if isinstance(statement, ast.Assign):
        return frozenset[str]().union(*map(_stored, statement.targets))
    if isinstance(statement, ast.AnnAssign | ast.AugAssign) and statement.value is not None:
        return _stored(statement.target)
    return frozenset()


def _stored(target: ast.expr) -> frozenset[str]:
    """The variables that an assignment to `target` replaces; an item of one is only changed."""
    return frozenset(n.id for n in _names(target) if isinstance(n.ctx, ast.Store))


def stores_elsewhere(statement: ast.stmt) -> bool:
    """Whether a statement changes something besides variables and their items."""
    return any(
        isinstance(node, ast.Attribute | ast.Subscript)
        and isinstance(node.ctx, ast.Store)
        and _of_item(node) is None
        for node in ast.walk(statement)
    )


def _names(node: ast.AST) -> Iterator[ast.Name]:
    return (n for n in ast.walk(node) if isinstance(n, ast.Name))


def is_steady(test: ast.expr) -> bool:
    """Whether a condition may be evaluated at an earlier point, because it calls nothing."""
    kinds = (ast.Name, ast.Attribute, ast.Constant, ast.Compare, ast.BoolOp, ast.UnaryOp)
    others = (ast.expr_context, ast.cmpop, ast.boolop, ast.unaryop)
    return all(isinstance(node, kinds + others) for node in ast.walk(test))
