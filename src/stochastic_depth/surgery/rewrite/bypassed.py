"""Warn when a method takes a path that bypasses one of its additions."""

import ast
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from stochastic_depth.errors import BypassedAdditionWarning
from stochastic_depth.gates import Gate
from stochastic_depth.surgery.edits import NOT_REACHED, AdditionEdit, RewriteEdit
from stochastic_depth.surgery.frames import SourceLocation
from stochastic_depth.surgery.rewrite.syntax import call, node_at


def warn_bypassed(gate: Gate, addition: str) -> None:
    """Warn that the method took a path that skips this addition; on the example it did not."""
    if gate.is_plain or torch.compiler.is_compiling():
        return
    warnings.warn(f"{addition}: {NOT_REACHED}", BypassedAdditionWarning, stacklevel=2)


def warn_where_bypassed(tree: ast.FunctionDef, edits: Sequence[RewriteEdit]) -> None:
    """Call `_bypassed` on every path that bypasses an addition but still calls something.

    Args:
        tree: the method, which is changed in place.
        edits: its edits; the gate of number n is in the variable `_gate_n`.
    """

    def calls_without_addition(nodes: Sequence[ast.AST]) -> bool:
        calls = any(isinstance(node, ast.Call) for part in nodes for node in ast.walk(part))
        fails = bool(nodes) and isinstance(nodes[-1], ast.Raise)
        return calls and not fails and not any(node_at(edit.location, *nodes) for edit in edits)

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
                    adds = node_at(edit.location, getattr(node, one))
                    if adds and calls_without_addition([value]):
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
