"""Which variables code uses and sets, and whether it changes anything else.

This is decided by the form of the code alone. Code that may change an object counts as changing it,
except where a method writes a new tensor part by part (`own_tensors`).
"""

import ast
from collections.abc import Iterator, Sequence

from stochastic_depth.surgery.rewrite.syntax import negated

_IDENTITY = (ast.Is, ast.IsNot, ast.Eq, ast.NotEq)
_STEADY = (ast.Name, ast.Attribute, ast.Constant, ast.Compare, ast.UnaryOp)
_STEADY += (ast.expr_context, ast.cmpop, ast.unaryop)
_CHANGES = frozenset(
    """
    append extend insert pop popitem popleft appendleft update setdefault remove clear setattr
    delattr exec eval
    """.split()
)
"""Names of functions and methods that change an object, such as a list."""
_OWN_VARIABLES = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda)
_OWN_VARIABLES += (ast.FunctionDef,)
"""Code that has variables of its own."""
_CREATE = frozenset(
    """
    zeros zeros_like ones ones_like empty empty_like full full_like new_zeros new_ones new_empty
    new_full clone
    """.split()
)
"""Names of functions and methods that create a tensor."""
_NEW_TENSORS = _CREATE | {"matmul", "bmm", "softmax"}
"""Names of functions and methods that return a new tensor; a module may hold layers so named."""


def only_assigns(statement: ast.stmt, own: frozenset[str]) -> bool:
    """Whether a statement does nothing but set variables, and write parts of `own`.

    The functions that it calls may do more.
    """
    match statement:
        case ast.Pass() | ast.Break() | ast.Continue():
            return True
        case ast.If():
            headers = [statement.test]
        case ast.For():
            headers = [statement.target, statement.iter]
        case ast.Assign() | ast.AnnAssign():
            return not changes_something(statement) or _fills(statement, own)
        case _:
            return _fills(statement, own)
    parts = [*statement.body, *statement.orelse]
    return not any(map(changes_something, headers)) and all(only_assigns(p, own) for p in parts)


def changes_something(node: ast.AST) -> bool:
    """Whether code may change an object, rather than only compute values and set variables.

    The functions that it calls may do so, too, if their names do not say it.
    """
    return any(map(_changes, ast.walk(node)))


def _changes(node: ast.AST) -> bool:
    match node:
        case ast.Expr(value=ast.Call(func=ast.Name(id="_bypassed"))):  # it only warns
            return False
        case ast.AugAssign() | ast.Expr(value=ast.Call()):
            return True
        case (
            ast.Attribute(ctx=ast.Store() | ast.Del()) | ast.Subscript(ctx=ast.Store() | ast.Del())
        ):
            return True
        case ast.Yield() | ast.YieldFrom() | ast.Await():  # others run meanwhile
            return True
        case ast.Import() | ast.ImportFrom() | ast.FunctionDef() | ast.ClassDef():
            return True
        case ast.Delete() | ast.ExceptHandler() | ast.Match():  # they set variables, too
            return True
        case ast.Call():
            return _is_in_place(node)
        case _:
            return False


def _is_in_place(call: ast.Call) -> bool:
    """Whether a call changes an object that exists before, by its name and arguments."""
    name = _function(call)
    advances = name == "next" and any(isinstance(a, ast.Name | ast.Attribute) for a in call.args)
    return (
        (_ends_as_in_place(name) and not _is_just_made(getattr(call.func, "value", None)))
        or name in _CHANGES
        or advances
        or any(
            k.arg == "out" or (k.arg == "inplace" and not _is_false(k.value)) for k in call.keywords
        )
    )


def _ends_as_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _is_just_made(value: ast.expr | None) -> bool:
    """Whether an expression creates the tensor that it returns, as `torch.zeros_like(x)` does."""
    match value:
        case ast.Call(func=ast.Attribute(value=changed)) if _ends_as_in_place(_function(value)):
            return _is_just_made(changed)
        case _:
            return isinstance(value, ast.Call) and _function(value) in _CREATE


def _function(call: ast.Call) -> str:
    """The last part of the name of the function that a call calls, or an empty text."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def _is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and not value.value


def own_tensors(block: list[ast.stmt], index: int, module: str) -> frozenset[str]:
    """The variables of which `block[index]` writes parts, if each holds a new tensor of the method.

    An example is `y` in `y = torch.zeros_like(x)`, then `y[i] = f(x[i])` for each `i`. Between the
    two, nothing else uses the variable. So if nothing uses it afterwards, nothing can notice that
    it was not written.

    Args:
        module: the name of the variable that holds the module.
    """
    written = {written_by(n) for n in ast.walk(block[index]) if isinstance(n, ast.stmt)}
    return frozenset(name for name in written if name and _is_new(name, block[: index + 1], module))


def _is_new(name: str, statements: list[ast.stmt], module: str) -> bool:
    """Whether the last of `statements` that sets a variable creates its tensor, and all after it do
    nothing with the variable but write parts of it."""
    for statement in reversed(statements):
        match statement:
            case ast.Assign(targets=[ast.Name(id=target)], value=made) if target == name:
                return _makes_tensor(made, module)
        parts = [n for n in ast.walk(statement) if isinstance(n, ast.stmt)]
        writes = (part for part in parts if _fills(part, frozenset({name})))
        inside = {node for part in writes for node in ast.walk(part)}
        if any(node.id == name and node not in inside for node in _names(statement)):
            return False
    return False


def _makes_tensor(value: ast.expr, module: str) -> bool:
    """Whether an expression returns a new tensor, which nothing else holds."""
    match value:
        case ast.BinOp(op=ast.MatMult()):
            return not changes_something(value)
        case ast.Call(func=function):
            of_module = module in {name.id for name in _names(function)}
            is_new = _function(value) in _NEW_TENSORS and not of_module
            return is_new and not changes_something(value)
        case _:
            return False


def written_by(statement: ast.stmt) -> str | None:
    """The variable of which a statement such as `y[i] = f` or `y.mul_(f)` writes a part."""
    match statement:
        case ast.Assign(targets=[ast.Subscript() as place]):
            pass
        case ast.AugAssign(target=ast.Name() | ast.Subscript() as place):
            pass
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=place)) as call):
            if not _is_in_place(call):
                return None
        case _:
            return None
    while not isinstance(place, ast.Name):
        match place:
            case ast.Subscript() | ast.Attribute():
                place = place.value
            case ast.Call():
                place = place.func
            case _:
                return None
    return place.id


def _fills(statement: ast.stmt, own: frozenset[str]) -> bool:
    """Whether a statement does nothing but write a part of one of `own`."""
    if written_by(statement) not in own or len(defines(statement)) > 1:
        return False
    writes = {statement, getattr(statement, "target", None)}
    if isinstance(statement, ast.Assign | ast.Expr):
        writes |= {statement.value if isinstance(statement, ast.Expr) else statement.targets[0]}
    return not any(_changes(part) for part in ast.walk(statement) if part not in writes)


def uses(node: ast.AST) -> frozenset[str]:
    """The variables whose values a node may need."""
    names = {n.id for n in _names(node) if not isinstance(n.ctx, ast.Store)}
    return frozenset(names | {name for n in ast.walk(node) if (name := _augmented(n))})


def _augmented(node: ast.AST) -> str:
    """The variable that `x += f` changes; empty for other code."""
    match node:
        case ast.AugAssign(target=ast.Name(id=name)):
            return name
        case _:
            return ""


def handed_out(statement: ast.stmt) -> list[ast.Name]:
    """The variables that a statement returns beside its result, such as `w` in `return y, w`."""
    nodes = list(ast.walk(statement))
    if any(isinstance(node, ast.FunctionDef) for node in nodes):
        return []
    tuples = [node.value for node in nodes if isinstance(node, ast.Return)]
    others = [v for value in tuples if isinstance(value, ast.Tuple) for v in value.elts[1:]]
    return [other for other in others if isinstance(other, ast.Name)]


def used_in_functions(tree: ast.FunctionDef) -> frozenset[str]:
    """The variables that functions defined in a method use when they are called."""
    functions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.Lambda))
    return frozenset[str]().union(
        *(uses(function) for function in functions if function is not tree)
    )


def conditional_uses(
    node: ast.stmt, handed: Sequence[ast.Name], module: str
) -> tuple[frozenset[str], dict[str, list[ast.expr]]]:
    """The variables that a statement always needs, and those it needs under some conditions.

    Args:
        handed: names in it that are not counted.
        module: the name of the variable that holds the module.
    """
    found: dict[str, list[list[ast.expr]]] = {}

    def visit(node: ast.AST, tests: list[ast.expr]) -> None:
        if isinstance(node, _OWN_VARIABLES):  # a condition in it may use them
            for name in uses(node):
                found.setdefault(name, []).append(tests)
            return
        if isinstance(node, ast.IfExp) and is_steady(node.test, module):
            visit(node.test, tests)
            for name in uses(node.body) & uses(node.orelse):
                found.setdefault(name, []).append(tests)
            visit(node.body, [*tests, node.test])
            visit(node.orelse, [*tests, negated(node.test)])
            return
        if (
            isinstance(node, ast.Name)
            and not isinstance(node.ctx, ast.Store)
            and node not in handed
        ):
            found.setdefault(node.id, []).append(tests)
        if name := _augmented(node):
            found.setdefault(name, []).append(tests)
        for child in ast.iter_child_nodes(node):
            visit(child, tests)

    visit(node, [])
    always = {name for name, each in found.items() if [] in each}
    return frozenset(always), {
        name: [tests[0] if len(tests) == 1 else ast.BoolOp(ast.And(), tests) for tests in each]
        for name, each in found.items()
        if name not in always
    }


def defines(node: ast.AST) -> frozenset[str]:
    """The variables that a node may set or change."""
    statements = (n for n in ast.walk(node) if isinstance(n, ast.stmt))
    written = (name for n in statements if (name := written_by(n)) is not None)
    return frozenset([*(name.id for name in stored(node)), *written])


def stored(node: ast.AST) -> Iterator[ast.Name]:
    """The names that a node sets, without the variables of comprehensions."""
    loops = (n.target for n in ast.walk(node) if isinstance(n, ast.comprehension))
    of_comprehensions = {name for target in loops for name in _names(target)}
    return (n for n in _names(node) if isinstance(n.ctx, ast.Store) and n not in of_comprehensions)


def surely_defines(statement: ast.stmt) -> frozenset[str]:
    """The variables that certainly have a new value after a statement."""
    if isinstance(statement, ast.If):
        both = [
            frozenset[str]().union(*map(surely_defines, part))
            for part in (statement.body, statement.orelse)
        ]
        return both[0] & both[1]
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign | ast.AugAssign) and statement.value is not None:
        targets = [statement.target]
    return frozenset(n.id for target in targets for n in stored(target))


def nodes_outside_functions(tree: ast.FunctionDef) -> Iterator[ast.AST]:
    """The nodes of a method, without those in functions and comprehensions inside of it."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if not isinstance(node, _OWN_VARIABLES):
            yield node
            waiting += ast.iter_child_nodes(node)


def _names(node: ast.AST) -> Iterator[ast.Name]:
    return (n for n in ast.walk(node) if isinstance(n, ast.Name))


def is_steady(test: ast.expr, module: str) -> bool:
    """Whether a condition may be evaluated at an earlier point: it calls nothing and cannot fail.

    `cfg.add` fails if `cfg` is None, for which the code may have an early return. What a module
    holds is taken to be as the code expects.

    Args:
        module: the name of the variable that holds the module.
    """
    match test:
        case ast.Name():
            return True
        case ast.BoolOp(values=parts):
            pass
        case ast.UnaryOp(op=ast.Not(), operand=part):
            parts = [part]
        case ast.Compare(ops=ops) if all(isinstance(op, _IDENTITY) for op in ops):
            parts = [test.left, *test.comparators]
        case _:
            of_module = {name.id for name in _names(test)} <= {module}
            return of_module and all(isinstance(node, _STEADY) for node in ast.walk(test))
    return all(is_steady(part, module) for part in parts)
