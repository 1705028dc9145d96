"""Rewrite a method so that its residual additions have gates.

For each addition the method is cut into what only the branch needs and all the rest. The first is
put under `if gate.open:`, so that a closed gate runs none of it, and the addition becomes its
shortcut.
"""

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

from stochastic_depth.errors import UnsupportedBlockError
from stochastic_depth.gates import Gate
from stochastic_depth.residual import scaled
from stochastic_depth.surgery.discover import Site
from stochastic_depth.surgery.liveness import (
    defines,
    is_optional,
    is_steady,
    only_assigns,
    stores_elsewhere,
    surely_defines,
    uses,
)

SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr)
NAMES = {"_scaled": scaled}
"""What generated code calls, besides `_gates`."""


def slice_method(
    function: FunctionType,
    sites: Sequence[Site],
    gates: Callable[[Any], Sequence[Gate]],
    copy_shortcut: bool,
) -> FunctionType:
    """`function`, with a gate for each of the additions at `sites`, in order of execution.

    Args:
        gates: called with the module in every call of the method; gives the gates of the sites.
        copy_shortcut: whether to clone the shortcut under a closed gate, because what follows the
            addition may overwrite it.

    Raises:
        UnsupportedBlockError: when the source is not there or not of a form that can be cut.
    """
    tree = _definition(function)
    for number, site in enumerate(sites):
        _cut(tree, site, f"_gate_{number}", copy_shortcut)
    names: list[ast.expr] = [ast.Name(f"_gate_{n}", ast.Store()) for n in range(len(sites))]
    module = ast.Name(tree.args.args[0].arg, ast.Load())
    assign = ast.Assign([ast.Tuple(names, ast.Store())], _call("_gates", module))
    tree.body.insert(0, assign)
    return _compiled(function, tree, {**NAMES, "_gates": gates})


def in_loop(site: Site) -> bool:
    """Whether the addition at `site` stands in a loop of its method."""
    loops = ast.For | ast.While
    tree = _definition(inspect.unwrap(vars(site.kind)[site.method]))
    inside = (n for loop in ast.walk(tree) if isinstance(loop, loops) for n in ast.walk(loop))
    return any(_is_at(node, site) for node in inside)


def _definition(function: FunctionType) -> ast.FunctionDef:
    """The syntax tree of `function`, its positions those in the file."""
    try:
        lines, first = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError) as error:
        raise UnsupportedBlockError(f"{function.__qualname__} has no source to cut") from error
    if not isinstance(tree, ast.FunctionDef) or not tree.args.args:
        raise UnsupportedBlockError(f"{function.__qualname__} is no plain method")
    ast.increment_lineno(tree, first - 1)
    indent = len(lines[0]) - len(lines[0].lstrip())
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt | ast.expr) and node.end_col_offset is not None:
            node.col_offset += indent
            node.end_col_offset += indent
    return tree


def _cut(tree: ast.FunctionDef, site: Site, gate: str, copy_shortcut: bool) -> None:
    """Put the addition at `site`, and all that only its branch needs, under `gate`, in place."""
    path, live = _find(tree.body, site, frozenset())
    block, index = path.pop()
    statement = block[index]
    if isinstance(statement, ast.AugAssign) and _is_at(statement, site):
        opened, closed, branch = _cut_statement(statement, site, gate, copy_shortcut)
        block[index] = ast.If(_is_open(gate), opened, [closed])
    else:
        closed = _Shortcut(site).visit(copy.deepcopy(statement))
        replace = _ReplaceExpression(site, gate, copy_shortcut)
        block[index] = replace.visit(statement)
        branch = replace.branch
    live = uses(closed) | (live - defines(closed))
    skipped, live = _skip_before(block, index, live, gate, [])
    guards: list[ast.expr] = []
    while path:
        inner = block
        block, index = path.pop()
        statement = block[index]
        if isinstance(statement, ast.If):
            if not is_steady(statement.test):
                break
            taken = inner is statement.body
            guards.append(statement.test if taken else ast.UnaryOp(ast.Not(), statement.test))
            live |= uses(statement.test)
        more, live = _skip_before(block, index, live, gate, guards)
        skipped += more
    if not any(isinstance(n, ast.Call) for node in (branch, *skipped) for n in ast.walk(node)):
        raise UnsupportedBlockError(f"{site}: its branch is not computed in this method alone")
    ast.fix_missing_locations(tree)


def _find(
    block: list[ast.stmt], site: Site, live_after: frozenset[str]
) -> tuple[list[tuple[list[ast.stmt], int]], frozenset[str]]:
    """Blocks and indices from the outermost to the statement at `site`; names needed after it."""
    for index, statement in enumerate(block):
        if not any(_is_at(node, site) for node in ast.walk(statement)):
            continue
        live = live_after
        for later in reversed(block[index + 1 :]):
            live = uses(later) | (live - surely_defines(later))
        if isinstance(statement, SIMPLE):
            return [(block, index)], live
        if isinstance(statement, ast.If | ast.With):
            for inner in (statement.body, getattr(statement, "orelse", [])):
                if any(_is_at(node, site) for part in inner for node in ast.walk(part)):
                    path, live = _find(inner, site, live)
                    return [(block, index), *path], live
        raise UnsupportedBlockError(f"{site}: an addition inside a {type(statement).__name__}")
    raise UnsupportedBlockError(f"{site}: the source has changed since it was imported")


def _skip_before(
    block: list[ast.stmt],
    index: int,
    live: frozenset[str],
    gate: str,
    guards: list[ast.expr],
) -> tuple[list[ast.stmt], frozenset[str]]:
    """Put the statements before `index` that nothing in `live` needs under `gate`, in place.

    Under a closed gate they are skipped if `guards`, the conditions under which the addition is
    reached at all, hold.

    Returns:
        What may be skipped, and the names needed before the block.
    """
    runs = _is_open(gate)
    if guards:
        reached = ast.BoolOp(ast.And(), guards) if len(guards) > 1 else guards[0]
        runs = ast.BoolOp(ast.Or(), [runs, ast.UnaryOp(ast.Not(), reached)])
    tests = list(guards)
    maybe: dict[str, list[ast.expr]] = {}  # names that are needed only if one of these holds
    skipped = []
    for i in range(index - 1, -1, -1):
        statement = block[i]
        defined = defines(statement)
        if tests and (stores_elsewhere(statement) or any(defined & uses(t) for t in tests)):
            # Before this statement the conditions may be others: all of it is kept.
            live = live.union(*map(uses, block[: i + 1]))
            break
        if only_assigns(statement) and not defined & live:
            skipped.append(statement)
            conditions = [test for name in defined for test in maybe.pop(name, [])]
            if conditions:
                _note(maybe, uses(statement) - live, conditions)
            needed = ast.BoolOp(ast.Or(), [runs, *conditions]) if conditions else runs
            block[i] = ast.If(copy.deepcopy(needed), [statement], [])
        elif is_optional(statement):
            live |= uses(statement.test)
            inside = frozenset[str]().union(*map(uses, statement.body))
            _note(maybe, inside - live, [statement.test])
            tests.append(statement.test)
        else:
            for name in surely_defines(statement):
                maybe.pop(name, None)
            live = uses(statement) | (live - surely_defines(statement))
    return skipped, live | frozenset(maybe)


def _note(maybe: dict[str, list[ast.expr]], names: frozenset[str], tests: list[ast.expr]) -> None:
    for name in names:
        maybe.setdefault(name, []).extend(tests)


def _cut_statement(
    statement: ast.AugAssign, site: Site, gate: str, copy_shortcut: bool
) -> tuple[list[ast.stmt], ast.stmt, ast.expr]:
    """`x += f` under an open and under a closed gate, and its branch."""
    if not isinstance(statement.target, ast.Name) or not isinstance(statement.op, ast.Add):
        raise UnsupportedBlockError(f"{site}: not an addition to a variable")
    name = statement.target.id
    opened = copy.deepcopy(statement)
    if site.shortcut == "left":
        opened.value = _call("_scaled", opened.value, gate)
        shortcut: ast.expr = ast.Name(name, ast.Load())
        before: list[ast.stmt] = []
        branch = statement.value
    else:
        scaling = _call("_scaled", ast.Name(name, ast.Load()), gate)
        before = [ast.Assign([ast.Name(name, ast.Store())], scaling)]
        shortcut, branch = statement.value, statement.target
    closed = ast.Assign([ast.Name(name, ast.Store())], _maybe_copy(shortcut, copy_shortcut))
    return [*before, opened], closed, branch


class _ReplaceExpression(ast.NodeTransformer):
    """`a + b` -> `a + _scaled(b, gate) if gate.open else a`."""

    def __init__(self, site: Site, gate: str, copy_shortcut: bool) -> None:
        self.site, self.gate, self.copy_shortcut = site, gate, copy_shortcut
        self.branch: ast.expr = ast.Constant(None)

    def visit(self, node: ast.AST) -> Any:
        if not _is_at(node, self.site):
            return self.generic_visit(node)
        shortcut, self.branch = _operands(node, self.site)
        opened = _Scale(self.branch, self.gate).visit(node)
        closed = _maybe_copy(copy.deepcopy(shortcut), self.copy_shortcut)
        return ast.IfExp(_is_open(self.gate), opened, closed)


class _Scale(ast.NodeTransformer):
    """Replace one node, found by identity, by `_scaled(node, gate)`."""

    def __init__(self, branch: ast.AST, gate: str) -> None:
        self.branch, self.gate = branch, gate

    def visit(self, node: ast.AST) -> Any:
        if node is self.branch and isinstance(node, ast.expr):
            return _call("_scaled", node, self.gate)
        return self.generic_visit(node)


class _Shortcut(ast.NodeTransformer):
    """Replace the addition at a site by its shortcut."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def visit(self, node: ast.AST) -> Any:
        return (
            _operands(node, self.site)[0] if _is_at(node, self.site) else self.generic_visit(node)
        )


def _operands(node: ast.AST, site: Site) -> tuple[ast.expr, ast.expr]:
    """Shortcut and branch of an addition: `a + b`, `torch.add(a, b)`, `a.add(b)`."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        pair = node.left, node.right
    elif isinstance(node, ast.Call) and not node.keywords and isinstance(node.func, ast.Attribute):
        if len(node.args) == 2 and node.func.attr == "add":
            pair = node.args[0], node.args[1]
        elif len(node.args) == 1 and node.func.attr in ("add", "add_"):
            pair = node.func.value, node.args[0]
        else:
            raise UnsupportedBlockError(f"{site}: a call that is not a plain addition")
    else:
        raise UnsupportedBlockError(f"{site}: an addition inside another function")
    return pair if site.shortcut == "left" else (pair[1], pair[0])


def _is_at(node: ast.AST, site: Site) -> bool:
    return (
        isinstance(node, ast.stmt | ast.expr)
        and site.position
        == (
            node.lineno,
            node.end_lineno,
            node.col_offset,
            node.end_col_offset,
        )
        and isinstance(node, ast.BinOp | ast.Call | ast.AugAssign)
    )


def _maybe_copy(shortcut: ast.expr, copied: bool) -> ast.expr:
    return ast.Call(ast.Attribute(shortcut, "clone", ast.Load()), [], []) if copied else shortcut


def _is_open(gate: str) -> ast.expr:
    return ast.Attribute(ast.Name(gate, ast.Load()), "open", ast.Load())


def _call(function: str, *arguments: ast.expr | str) -> ast.Call:
    values = [ast.Name(a, ast.Load()) if isinstance(a, str) else a for a in arguments]
    return ast.Call(ast.Name(function, ast.Load()), values, [])


def _compiled(
    function: FunctionType, tree: ast.FunctionDef, names: dict[str, Callable[..., Any]]
) -> FunctionType:
    """A function from `tree` with the globals, defaults and closure of `function`."""
    free = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    values = {**names, **{name: cell.cell_contents for name, cell in free.items()}}
    tree.decorator_list, tree.returns = [], None
    arguments = tree.args
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [value and ast.Constant(None) for value in arguments.kw_defaults]
    module = ast.parse(f"def _factory({', '.join(values)}): return {tree.name}")
    assert isinstance(module.body[0], ast.FunctionDef)
    module.body[0].body.insert(0, tree)
    ast.fix_missing_locations(module)
    made: dict[str, Any] = {}
    exec(compile(module, function.__code__.co_filename, "exec"), function.__globals__, made)
    result: FunctionType = made["_factory"](**values)
    result.__defaults__, result.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    result.__qualname__, result.__doc__ = function.__qualname__, function.__doc__
    return result
