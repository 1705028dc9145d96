"""Rewrite a method so that its residual additions have gates.

For each addition, the code of the method is divided into what only the branch needs, and the rest.
The first part is put under `if gate.open:`, so that a closed gate skips all of it, and the addition
becomes its shortcut. If a method only computes something that it passes to the module that adds,
the argument of that call is put under the gate.
"""

import ast
import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import FunctionType
from typing import Any

from stochastic_depth.errors import UnsupportedBlockError
from stochastic_depth.gates import Gate
from stochastic_depth.residual import with_shape_of
from stochastic_depth.surgery.edits import (
    AdditionEdit,
    ArgumentEdit,
    CallParameter,
    RewriteEdit,
)
from stochastic_depth.surgery.frames import SourceLocation
from stochastic_depth.surgery.rewrite.bypassed import warn_bypassed, warn_where_bypassed
from stochastic_depth.surgery.rewrite.liveness import Backward, Needed, assign
from stochastic_depth.surgery.rewrite.select_samples import select_drawn, select_in_source
from stochastic_depth.surgery.rewrite.syntax import (
    call,
    compiled,
    definition,
    is_open,
    module_of,
    negated,
    node_at,
    of_gate,
    operands,
    replaced,
)
from stochastic_depth.surgery.rewrite.variables import (
    changes_something,
    defines,
    handed_out,
    is_steady,
    surely_defines,
    used_in_functions,
    uses,
)
from stochastic_depth.tensors import promoted


def edit_statement(
    statement: ast.AugAssign, edit: AdditionEdit, gate: str
) -> tuple[list[ast.stmt], ast.stmt, list[ast.AST]]:
    """`x += f` under an open gate, the same under a closed gate, and the branch in it."""
    if not isinstance(statement.target, ast.Name) or not isinstance(statement.op, ast.Add):
        raise UnsupportedBlockError(f"{edit.location}: not an addition to a variable")
    name = statement.target.id
    if edit.side == 0:
        branch: ast.expr = statement.value
        statement.value = of_gate(gate, "scale", branch)
        shortcut: ast.expr = ast.Name(name, ast.Load())
        before: list[ast.stmt] = []
    else:
        branch, shortcut = ast.Name(name, ast.Load()), copy.deepcopy(statement.value)
        before = [assign(name, of_gate(gate, "scale", branch))]
    return [*before, statement], assign(name, _as_sum(shortcut, edit)), [branch]


def put_gate(node: ast.expr, edit: AdditionEdit, gate: str) -> tuple[ast.IfExp, ast.expr]:
    """`a + b` -> `a + gate.scale(b) if gate.open else a`, and the branch `b`."""
    shortcut, branch = operands(node, edit)
    closed = _as_sum(copy.deepcopy(shortcut), edit)
    if branch is node:
        opened: ast.expr = of_gate(gate, "rescale", branch, copy.deepcopy(shortcut))
    else:
        opened = replaced(node, branch, of_gate(gate, "scale", branch))
        if isinstance(shortcut, ast.Name):
            opened = call("_with_shape_of", copy.deepcopy(shortcut), opened)
    return ast.IfExp(is_open(gate), opened, closed), branch


def edit_arguments(
    statement: ast.stmt, edit: ArgumentEdit, gate: str
) -> tuple[ast.stmt, list[ast.AST]]:
    """Turn `f(a, b)` into `f(a if gate.open else None, b)`, in place.

    Returns:
        The statement under a closed gate, and the expressions of the branch.
    """
    closed = copy.deepcopy(statement)
    _exchange_arguments(closed, edit, lambda _: ast.Constant(None))
    branch = _exchange_arguments(
        statement, edit, lambda value: ast.IfExp(is_open(gate), value, ast.Constant(None))
    )
    return closed, branch


def _exchange_arguments(
    statement: ast.stmt, edit: ArgumentEdit, exchange: Callable[[ast.expr], ast.expr]
) -> list[ast.AST]:
    """Replace arguments of a call in place; returns the original arguments."""
    at = node_at(edit.location, statement)
    before: list[ast.AST] = []
    if isinstance(at, ast.Call) and not any(isinstance(a, ast.Starred) for a in at.args):
        positions = {n for n, _ in edit.arguments if n is not None}
        names = {name for _, name in edit.arguments if name is not None}
        for n, value in enumerate(at.args):
            if n in positions:
                before.append(value)
                at.args[n] = exchange(value)
        for keyword in at.keywords:
            if keyword.arg in names:
                before.append(keyword.value)
                keyword.value = exchange(keyword.value)
    if not before:  # a parameter that is not passed has its default
        raise UnsupportedBlockError(f"{edit.location}: not a plain call of the module that adds")
    return before


def _as_sum(shortcut: ast.expr, edit: AdditionEdit) -> ast.expr:
    """The expression of a closed addition: the shortcut, with the dtype of the sum."""
    if edit.promotion is not None:
        shortcut = call("_promoted", shortcut, *map(ast.Constant, edit.promotion))
    return (
        ast.Call(ast.Attribute(shortcut, "clone", ast.Load()), [], []) if edit.copies else shortcut
    )


SUMS = {"_promoted": promoted, "_with_shape_of": with_shape_of}
"""The functions that edited code calls on sums."""
SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr)


def slice_method(
    function: FunctionType,
    edits: Sequence[RewriteEdit],
    gates: Callable[[Any], Sequence[Gate]],
    select: bool,
) -> FunctionType:
    """`function`, with a gate at each of `edits`, in order of execution.

    Args:
        gates: called with the module in every call of the method; returns the gates of the edits.
        select: whether a gate may run the branch on some of the samples only.

    Raises:
        UnsupportedBlockError: when the source is missing or has a form that cannot be edited.
    """
    tree = definition(function)
    warn_where_bypassed(tree, edits)
    for number, edit in enumerate(edits):
        back, _ = _edit(tree, edit, f"_gate_{number}")
        if select:
            select_in_source(tree, back.branch, back.shared, f"_gate_{number}")
    names: list[ast.expr] = [ast.Name(f"_gate_{n}", ast.Store()) for n in range(len(edits))]
    drawn = call("_gates", module_of(tree))
    tree.body.insert(0, ast.Assign([ast.Tuple(names, ast.Store())], drawn))
    names_used = {"_gates": gates, "_select": select_drawn, "_bypassed": warn_bypassed}
    return compiled(function, tree, {**names_used, **SUMS})


@functools.lru_cache(maxsize=1024)
def skipped_when_closed(edit: RewriteEdit) -> tuple[bool, tuple[CallParameter, ...]]:
    """Whether a closed gate at `edit` skips any call or matrix product; and the parameters that
    only the branch needs."""
    function = inspect.unwrap(vars(edit.location.cls)[edit.location.method])
    tree = definition(function)
    used = uses(tree)
    back, needed = _edit(tree, edit, "_gate")
    branch = [*back.branch, *back.shared]
    parts = (node for part in branch for node in ast.walk(part))
    works = any(isinstance(node, ast.Call | ast.MatMult) for node in parts)
    positional = [argument.arg for argument in [*tree.args.posonlyargs, *tree.args.args][1:]]
    named = [(None, argument.arg) for argument in tree.args.kwonlyargs]
    parameters = [*enumerate(positional), *named]
    return works, tuple((n, name) for n, name in parameters if name in used - needed)


def _edit(tree: ast.FunctionDef, edit: RewriteEdit, gate: str) -> tuple[Backward, frozenset[str]]:
    """Put everything that only the branch at `edit` needs under `gate`, in place.

    Returns:
        The code that is under the gate; and the variables that the method needs if it is closed.
    """
    if any(isinstance(node, ast.Global | ast.Nonlocal) for node in ast.walk(tree)):
        raise UnsupportedBlockError(
            f"{edit.location}: its method sets global variables, or those of a function around it"
        )
    module = module_of(tree)
    path, needed = _find(tree.body, edit.location, Needed(module, used_in_functions(tree)))
    later = [part for block, index in path for part in block[index + 1 :]]
    block, index = path.pop()
    statement = block[index] = _as_assignment(block[index])
    closed: ast.stmt
    branch: list[ast.AST]
    if isinstance(edit, ArgumentEdit):
        closed, branch = edit_arguments(statement, edit, gate)
    elif isinstance(node := node_at(edit.location, statement), ast.AugAssign):
        if any(map(changes_something, later)):
            edit = replace(edit, copies=True)
        opened, closed, branch = edit_statement(node, edit, gate)
        block[index] = ast.copy_location(ast.If(is_open(gate), opened, [closed]), statement)
    else:
        assert isinstance(node, ast.expr)
        closed = _as_shortcut(copy.deepcopy(statement), edit)
        if any(map(changes_something, [closed, *later])):
            edit = replace(edit, copies=True)
        gated, part = put_gate(node, edit, gate)
        block[index], branch = replaced(statement, node, gated), [part]
    if any(changes_something(part) or defines(part) for part in branch):
        raise UnsupportedBlockError(
            f"{edit.location}: the expression of its branch changes an object or sets a variable"
        )
    needed.before(closed, defines(closed), handed_out(closed))
    back = Backward(is_open(gate), branch, module)
    skips = back.through(block, index, needed)
    while path:
        inner = block
        block, index = path.pop()
        statement = block[index]
        if isinstance(statement, ast.If):
            skips = skips and is_steady(statement.test, module)
            needed.live |= uses(statement.test)
            if inner is statement.body:
                back.reached_if(statement.test, [*statement.orelse, *later])
            else:
                back.reached_if(negated(statement.test), [*statement.body, *later])
        elif isinstance(statement, ast.With):
            needed.everything(statement.items)
        if skips:
            skips = back.through(block, index, needed)
        else:
            needed.everything(block[:index])
    ast.fix_missing_locations(tree)
    return back, needed.live | frozenset(needed.maybe) | needed.handed_out | back.otherwise


def _as_shortcut(statement: ast.stmt, edit: AdditionEdit) -> ast.stmt:
    """`statement`, with its addition replaced by the shortcut in place."""
    node = node_at(edit.location, statement)
    assert node is not None
    return replaced(statement, node, operands(node, edit)[0])


def _as_assignment(statement: ast.stmt) -> ast.stmt:
    """Turn `y.add_(x)` into `y = y.add_(x)`, so that a closed gate has a variable to assign to."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        function = statement.value.func
        changed = function.value if isinstance(function, ast.Attribute) else None
        if isinstance(changed, ast.Name) and ast.unparse(function).endswith("_"):
            assigned = assign(changed.id, statement.value)
            return ast.fix_missing_locations(ast.copy_location(assigned, statement))
    return statement


def _find(
    block: list[ast.stmt], location: SourceLocation, needed: Needed
) -> tuple[list[tuple[list[ast.stmt], int]], Needed]:
    """The path to the statement at `location`: lists of statements, each with an index, outermost
    first; and the variables that are needed after that statement.

    Args:
        needed: the variables that are needed after `block`; updated in place.

    Raises:
        UnsupportedBlockError: when the addition is inside a loop or in another unsupported form.
    """
    for index, statement in enumerate(block):
        if node_at(location, statement) is None:
            continue
        for later in reversed(block[index + 1 :]):
            needed.before(later, surely_defines(later), handed_out(later))
        if isinstance(statement, SIMPLE):
            return [(block, index)], needed
        if isinstance(statement, ast.If | ast.With):
            for inner in (statement.body, getattr(statement, "orelse", [])):
                if node_at(location, *inner):
                    path, needed = _find(inner, location, needed)
                    return [(block, index), *path], needed
        raise UnsupportedBlockError(f"{location}: an addition inside a {type(statement).__name__}")
    raise UnsupportedBlockError(f"{location}: the source has changed since it was imported")
