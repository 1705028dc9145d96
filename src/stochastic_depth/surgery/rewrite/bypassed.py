"""Warn when a method takes another path than on the example: one that bypasses an addition of it,
or that makes a further one."""

import ast
import inspect
import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial

import torch

from stochastic_depth.errors import BypassedAdditionWarning, UnsupportedBlockError
from stochastic_depth.gates import Gate
from stochastic_depth.surgery.edits import (
    NOT_ON_EXAMPLE,
    NOT_REACHED,
    AdditionEdit,
    RewriteEdit,
)
from stochastic_depth.surgery.frames import CallSite, SourceLocation
from stochastic_depth.surgery.rewrite.syntax import (
    call,
    definition,
    module_of,
    node_at,
    operands,
    position_of,
    replaced,
)
from stochastic_depth.surgery.rewrite.variables import defines, nodes_outside_functions, uses


def warn_bypassed(gate: Gate, message: str) -> None:
    """Warn that the method took a path that it did not take on the example."""
    if gate.is_plain or torch.compiler.is_compiling():
        return
    warnings.warn(message, BypassedAdditionWarning, stacklevel=2)


def warn_where_bypassed(tree: ast.FunctionDef, edits: Sequence[RewriteEdit]) -> None:
    """Call `_bypassed` on every path that bypasses an addition but still calls something, and where
    the method adds on a path that the example does not take.

    Args:
        tree: the method, which is changed in place.
        edits: its edits; the gate of number n is in the variable `_gate_n`.
    """

    def calls_without_addition(nodes: Sequence[ast.AST]) -> bool:
        calls = any(isinstance(node, ast.Call) for part in nodes for node in ast.walk(part))
        fails = bool(nodes) and isinstance(nodes[-1], ast.Raise)
        return calls and not fails and not any(node_at(edit.location, *nodes) for edit in edits)

    insertions: list[Callable[[], None]] = []
    around: list[ast.AST] = []
    """What runs only if a warning was given."""
    for number, edit in enumerate(edits):
        if not isinstance(edit, AdditionEdit):
            continue
        message = ast.Constant(f"{edit}: {NOT_REACHED}")
        warning = call("_bypassed", f"_gate_{number}", message)
        for block, start in _paths_around(tree.body, edit.location):
            if calls_without_addition(block[start:]):
                before = block[start]
                around += block[start:]
                insertions.append(partial(_insert, block, before, ast.Expr(warning)))
        for node in ast.walk(tree):
            if isinstance(node, ast.IfExp):
                for one, other in (("body", "orelse"), ("orelse", "body")):
                    value = getattr(node, other)
                    adds = node_at(edit.location, getattr(node, one))
                    if adds and calls_without_addition([value]):
                        around.append(value)
                        warned = ast.BoolOp(ast.Or(), [warning, value])
                        insertions.append(partial(setattr, node, other, warned))
    for location, number in _not_shown(edits).items():
        node = node_at(location, tree)
        if node is not None and not node_at(location, *around):
            warning = call(
                "_bypassed", f"_gate_{number}", ast.Constant(f"{location}: {NOT_ON_EXAMPLE}")
            )
            value = node.value if isinstance(node, ast.AugAssign) else node
            warned = ast.copy_location(ast.BoolOp(ast.Or(), [warning, value]), value)
            insertions.append(partial(replaced, tree, value, warned))
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
        if node_at(location, statement):
            for arm in (getattr(statement, "body", []), getattr(statement, "orelse", [])):
                if node_at(location, *arm):
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


def _not_shown(edits: Sequence[RewriteEdit]) -> dict[SourceLocation, int]:
    """The additions that the example does not reach, each with the number of an edit alike."""
    shown = {edit.location for edit in edits}
    return {
        location: number
        for number, edit in enumerate(edits)
        if isinstance(edit, AdditionEdit)
        for location in edit.not_shown
        if location not in shown
    }


def not_reached(edit: AdditionEdit, reached: Container[CallSite]) -> tuple[SourceLocation, ...]:
    """The additions alike in the method of `edit` that are not among those `reached`."""
    code = inspect.unwrap(vars(edit.location.cls)[edit.location.method]).__code__
    function = code.co_filename, code.co_qualname, code.co_firstlineno
    return tuple(at for at in _alike(edit) if (*function, at.position) not in reached)


@lru_cache(maxsize=1024)
def _alike(edit: AdditionEdit) -> tuple[SourceLocation, ...]:
    """The additions in the method of `edit` to the same variable, of what modules compute.

    None are looked for in functions inside of it, nor if a condition in it names `training`, since
    the recorded pass is in evaluation mode.
    """
    try:
        tree = definition(inspect.unwrap(vars(edit.location.cls)[edit.location.method]))
        at = node_at(edit.location, tree)
        if isinstance(at, ast.AugAssign):
            shortcut = (at.target, at.value)[edit.side]
        else:
            shortcut = at and operands(at, edit)[0]
    except UnsupportedBlockError:
        return ()
    nodes, module = list(nodes_outside_functions(tree)), module_of(tree)
    tests = [node.test for node in nodes if isinstance(node, ast.If | ast.IfExp)]
    if not isinstance(shortcut, ast.Name) or any("training" in ast.unparse(t) for t in tests):
        return ()

    def calls_module(value: ast.AST) -> bool:
        calls = (node for node in ast.walk(value) if isinstance(node, ast.Call))
        return any(module in uses(each.func) for each in calls)

    computed = frozenset[str]().union(
        *(defines(n) for n in nodes if isinstance(n, ast.Assign) and calls_module(n.value))
    ) - {shortcut.id}

    def is_residual(one: ast.expr, other: ast.expr) -> bool:
        adds_to_it = isinstance(one, ast.Name) and one.id == shortcut.id
        return adds_to_it and (calls_module(other) or not computed.isdisjoint(uses(other)))

    found: list[SourceLocation] = []
    for node in nodes:
        match node:
            case (
                ast.BinOp(op=ast.Add(), left=one, right=other)
                | ast.AugAssign(op=ast.Add(), target=one, value=other)
            ) if is_residual(one, other) or is_residual(other, one):
                found.append(replace(edit.location, position=position_of(node)))
    return tuple(found)
