"""Rewrite a method so that its residual additions have gates.

For each addition, the code of the method is divided into what only the branch needs, and the rest.
The first part is put under `if gate.open:`, so that a closed gate skips all of it, and the addition
becomes its shortcut. If a method only computes something that it passes to the module that adds,
the argument of that call is put under the gate.
"""

import ast
import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import FunctionType
from typing import Any

import torch

from stochastic_depth.errors import BypassedAdditionWarning, UnsupportedBlockError
from stochastic_depth.gates import Gate
from stochastic_depth.surgery.edits import (
    NOT_REACHED,
    AdditionEdit,
    ArgumentEdit,
    CallParameter,
    RewriteEdit,
)
from stochastic_depth.surgery.frames import SourceLocation
from stochastic_depth.surgery.rewrite.changes import Changes
from stochastic_depth.surgery.rewrite.liveness import Backward, Needed, assign, negated
from stochastic_depth.surgery.rewrite.select_samples import select_drawn, select_in_source
from stochastic_depth.surgery.rewrite.syntax import (
    call,
    compiled,
    definition,
    is_at,
    is_open,
    of_gate,
    operands,
)
from stochastic_depth.surgery.rewrite.variables import defines, is_steady, surely_defines, uses


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
    return [*before, statement], assign(name, _maybe_copy(shortcut, edit.copies)), [branch]


class GateAddition(ast.NodeTransformer):
    """`a + b` -> `a + gate.scale(b) if gate.open else a`."""

    def __init__(self, edit: AdditionEdit, gate: str) -> None:
        self.edit, self.gate = edit, gate
        self.branch: ast.expr = ast.Constant(None)

    def visit(self, node: ast.AST) -> Any:
        if not is_at(node, self.edit.location):
            return self.generic_visit(node)
        shortcut, self.branch = operands(node, self.edit)
        if self.branch is not node:
            opened = _Scale(self.branch, self.gate).visit(node)
        else:
            opened = of_gate(self.gate, "rescale", self.branch, copy.deepcopy(shortcut))
        closed = _maybe_copy(copy.deepcopy(shortcut), self.edit.copies)
        return ast.IfExp(is_open(self.gate), opened, closed)


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
    at = next(node for node in ast.walk(statement) if is_at(node, edit.location))
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
    if len(before) != len(edit.arguments):
        raise UnsupportedBlockError(f"{edit.location}: not a plain call of the module that adds")
    return before


class _Scale(ast.NodeTransformer):
    """Replaces one node, found by identity, by `gate.scale(node)`."""

    def __init__(self, branch: ast.AST, gate: str) -> None:
        self.branch, self.gate = branch, gate

    def visit(self, node: ast.AST) -> Any:
        if node is self.branch and isinstance(node, ast.expr):
            return of_gate(self.gate, "scale", node)
        return self.generic_visit(node)


class ReplaceByShortcut(ast.NodeTransformer):
    """Replaces an addition by its shortcut."""

    def __init__(self, edit: AdditionEdit) -> None:
        self.edit = edit

    def visit(self, node: ast.AST) -> Any:
        if is_at(node, self.edit.location):
            return operands(node, self.edit)[0]
        return self.generic_visit(node)


def _maybe_copy(shortcut: ast.expr, copied: bool) -> ast.expr:
    return ast.Call(ast.Attribute(shortcut, "clone", ast.Load()), [], []) if copied else shortcut


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
    _warn_where_bypassed(tree, edits)
    module, *others = function.__code__.co_varnames + function.__code__.co_cellvars
    for number, edit in enumerate(edits):
        back, _ = _edit(tree, function, edit, f"_gate_{number}")
        if select:
            drawn_only = [*back.branch, *back.unused]
            select_in_source(tree, drawn_only, back.shared, set(others), f"_gate_{number}")
    names: list[ast.expr] = [ast.Name(f"_gate_{n}", ast.Store()) for n in range(len(edits))]
    drawn = call("_gates", ast.Name(module, ast.Load()))
    tree.body.insert(0, ast.Assign([ast.Tuple(names, ast.Store())], drawn))
    names_used = {"_gates": gates, "_select": select_drawn, "_bypassed": _warn_bypassed}
    return compiled(function, tree, names_used)


def _warn_bypassed(gate: Gate, addition: str) -> None:
    """Warn that the method took a path that skips this addition; on the example it did not."""
    if gate.is_plain or torch.compiler.is_compiling():
        return
    warnings.warn(f"{addition}: {NOT_REACHED}", BypassedAdditionWarning, stacklevel=2)


def _warn_where_bypassed(tree: ast.FunctionDef, edits: Sequence[RewriteEdit]) -> None:
    """Call `_warn_bypassed` on every path that bypasses an addition but still calls something."""

    def has_addition(nodes: Sequence[ast.AST], among: Sequence[RewriteEdit] = edits) -> bool:
        inside = [node for part in nodes for node in ast.walk(part)]
        return any(is_at(node, edit.location) for node in inside for edit in among)

    def calls_without_addition(nodes: Sequence[ast.AST]) -> bool:
        calls = any(isinstance(node, ast.Call) for part in nodes for node in ast.walk(part))
        fails = bool(nodes) and isinstance(nodes[-1], ast.Raise)
        return calls and not fails and not has_addition(nodes)

    insertions: list[Callable[[], None]] = []
    for number, edit in enumerate(edits):
        if not isinstance(edit, AdditionEdit):
            continue
        warning = call("_bypassed", f"_gate_{number}", ast.Constant(str(edit)))
        for block, start in _paths_around(tree.body, edit.location):
            if calls_without_addition(block[start:]):
                before = block[start]
                insertions.append(partial(_insert, block, before, ast.Expr(warning)))
        for node in ast.walk(tree):
            if isinstance(node, ast.IfExp):
                for one, other in (("body", "orelse"), ("orelse", "body")):
                    value = getattr(node, other)
                    if has_addition([getattr(node, one)], [edit]) and calls_without_addition(
                        [value]
                    ):
                        warned = ast.BoolOp(ast.Or(), [warning, value])
                        insertions.append(partial(setattr, node, other, warned))
    for insert in insertions:
        insert()
    ast.fix_missing_locations(tree)


def _insert(block: list[ast.stmt], before: ast.stmt, statement: ast.stmt) -> None:
    block.insert(block.index(before), statement)


def _paths_around(
    block: list[ast.stmt], location: SourceLocation
) -> Iterator[tuple[list[ast.stmt], int]]:
    """The control-flow paths that bypass `location`.

    Yields:
        A list of statements, and the index of the first statement that runs only when `location` is
        bypassed.
    """
    for index, statement in enumerate(block):
        if any(is_at(node, location) for node in ast.walk(statement)):
            for arm in (getattr(statement, "body", []), getattr(statement, "orelse", [])):
                if any(is_at(node, location) for part in arm for node in ast.walk(part)):
                    yield from _paths_around(arm, location)
                    if isinstance(statement, ast.If) and isinstance(arm[-1], ast.Return):
                        yield block, index + 1
                elif isinstance(statement, ast.If):
                    yield arm, 0
            return
        for node in ast.walk(statement):
            if isinstance(node, ast.If):
                for arm in (node.body, node.orelse):
                    if any(isinstance(part, ast.Return) for part in arm):
                        yield arm, 0


def skipped_when_closed(edit: RewriteEdit) -> tuple[bool, tuple[CallParameter, ...]]:
    """Whether a closed gate at `edit` skips any call; and parameters that only the branch needs."""
    function = inspect.unwrap(vars(edit.location.cls)[edit.location.method])
    tree = definition(function)
    used = uses(tree)
    back, needed = _edit(tree, function, edit, "_gate")
    branch = [*back.branch, *back.shared]
    calls = any(isinstance(node, ast.Call) for part in branch for node in ast.walk(part))
    positional = [argument.arg for argument in [*tree.args.posonlyargs, *tree.args.args][1:]]
    named = [(None, argument.arg) for argument in tree.args.kwonlyargs]
    parameters = [*enumerate(positional), *named]
    return calls, tuple((n, name) for n, name in parameters if name in used - needed)


def _edit(
    tree: ast.FunctionDef, function: FunctionType, edit: RewriteEdit, gate: str
) -> tuple[Backward, frozenset[str]]:
    """Put everything that only the branch at `edit` needs under `gate`, in place.

    Args:
        function: the function that `tree` is the source of.

    Returns:
        The code that is under the gate; and the variables that the method needs if it is closed.
    """
    changes = Changes(tree, function, edit.location.cls)
    if isinstance(edit, AdditionEdit) and not edit.copies:
        sums = (node for node in ast.walk(tree) if is_at(node, edit.location))
        edit = replace(edit, copies=any(map(changes.changes_result, sums)))
    path, needed = _find(tree.body, edit.location, Needed())
    block, index = path.pop()
    statement = block[index] = _as_assignment(block[index])
    branch: list[ast.AST]
    if isinstance(edit, ArgumentEdit):
        closed, branch = edit_arguments(statement, edit, gate)
    elif isinstance(statement, ast.AugAssign) and is_at(statement, edit.location):
        opened, closed, branch = edit_statement(statement, edit, gate)
        block[index] = ast.If(is_open(gate), opened, [closed])
    else:
        closed = ReplaceByShortcut(edit).visit(copy.deepcopy(statement))
        put_gate = GateAddition(edit, gate)
        block[index] = put_gate.visit(statement)
        branch = [put_gate.branch]
    if any(map(changes.visible, branch)):
        raise UnsupportedBlockError(
            f"{edit.location}: its branch changes an object that is used outside of the method"
        )
    needed.before(closed, defines(closed))
    back = Backward(is_open(gate), edit.dead, branch, changes)
    back.through(block, index, needed)
    while path:
        inner = block
        block, index = path.pop()
        statement = block[index]
        if isinstance(statement, ast.If):
            if not is_steady(statement.test):
                break
            back.reached_if(statement.test if inner is statement.body else negated(statement.test))
            needed.live |= uses(statement.test)
            needed.used |= uses(statement.test)
        back.through(block, index, needed)
    ast.fix_missing_locations(tree)
    return back, needed.live | frozenset(needed.maybe)


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
        if not any(is_at(node, location) for node in ast.walk(statement)):
            continue
        for later in reversed(block[index + 1 :]):
            needed.before(later, surely_defines(later))
        if isinstance(statement, SIMPLE):
            return [(block, index)], needed
        if isinstance(statement, ast.If | ast.With):
            for inner in (statement.body, getattr(statement, "orelse", [])):
                if any(is_at(node, location) for part in inner for node in ast.walk(part)):
                    path, needed = _find(inner, location, needed)
                    return [(block, index), *path], needed
        raise UnsupportedBlockError(f"{location}: an addition inside a {type(statement).__name__}")
    raise UnsupportedBlockError(f"{location}: the source has changed since it was imported")
