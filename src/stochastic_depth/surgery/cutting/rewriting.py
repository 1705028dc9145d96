"""The syntax of an addition, or of a call, under a gate."""

import ast
import copy
from collections.abc import Callable
from typing import Any

from stochastic_depth.errors import UnsupportedBlockError
from stochastic_depth.surgery.cutting.backward import assign
from stochastic_depth.surgery.discovery.cuts import Argument, Place, Sum


def cut_statement(
    statement: ast.AugAssign, cut: Sum, gate: str, copy_shortcut: bool
) -> tuple[list[ast.stmt], ast.stmt, list[ast.AST]]:
    """`x += f` under an open and under a closed gate, and its branch."""
    if not isinstance(statement.target, ast.Name) or not isinstance(statement.op, ast.Add):
        raise UnsupportedBlockError(f"{cut.place}: not an addition to a variable")
    name = statement.target.id
    opened = copy.deepcopy(statement)
    if cut.shortcut == "left":
        branch: ast.expr = opened.value
        opened.value = of_gate(gate, "scale", branch)
        shortcut: ast.expr = ast.Name(name, ast.Load())
        before: list[ast.stmt] = []
    else:
        branch, shortcut = ast.Name(name, ast.Load()), statement.value
        before = [assign(name, of_gate(gate, "scale", branch))]
    return [*before, opened], assign(name, _maybe_copy(shortcut, copy_shortcut)), [branch]


class ReplaceSum(ast.NodeTransformer):
    """`a + b` -> `a + gate.scale(b) if gate.open else a`."""

    def __init__(self, cut: Sum, gate: str, copy_shortcut: bool) -> None:
        self.cut, self.gate, self.copy_shortcut = cut, gate, copy_shortcut
        self.branch: ast.expr = ast.Constant(None)

    def visit(self, node: ast.AST) -> Any:
        if not is_at(node, self.cut.place):
            return self.generic_visit(node)
        shortcut, self.branch = _operands(node, self.cut)
        if self.cut.within is None:
            opened = _Scale(self.branch, self.gate).visit(node)
        else:
            opened = of_gate(self.gate, "rescale", self.branch, copy.deepcopy(shortcut))
        closed = _maybe_copy(copy.deepcopy(shortcut), self.copy_shortcut)
        return ast.IfExp(is_open(self.gate), opened, closed)


def cut_arguments(statement: ast.stmt, cut: Argument, gate: str) -> tuple[ast.stmt, list[ast.AST]]:
    """`f(a, b)` -> `f(a if gate.open else None, b)`, in place; the closed form, and the branch."""
    closed = copy.deepcopy(statement)
    _exchange_arguments(closed, cut, lambda _: ast.Constant(None))
    branch = _exchange_arguments(
        statement, cut, lambda value: ast.IfExp(is_open(gate), value, ast.Constant(None))
    )
    return closed, branch


def _exchange_arguments(
    statement: ast.stmt, cut: Argument, exchange: Callable[[ast.expr], ast.expr]
) -> list[ast.AST]:
    """Put something else in place of the arguments of a call; returns what they were."""
    at = next(node for node in ast.walk(statement) if is_at(node, cut.place))
    before: list[ast.AST] = []
    if isinstance(at, ast.Call) and not any(isinstance(a, ast.Starred) for a in at.args):
        positions = {n for n, _ in cut.arguments if n is not None}
        names = {name for _, name in cut.arguments if name is not None}
        for n, value in enumerate(at.args):
            if n in positions:
                before.append(value)
                at.args[n] = exchange(value)
        for keyword in at.keywords:
            if keyword.arg in names:
                before.append(keyword.value)
                keyword.value = exchange(keyword.value)
    if len(before) != len(cut.arguments):
        raise UnsupportedBlockError(f"{cut.place}: not a plain call of the module that adds")
    return before


class _Scale(ast.NodeTransformer):
    """Replace one node, found by identity, by `gate.scale(node)`."""

    def __init__(self, branch: ast.AST, gate: str) -> None:
        self.branch, self.gate = branch, gate

    def visit(self, node: ast.AST) -> Any:
        if node is self.branch and isinstance(node, ast.expr):
            return of_gate(self.gate, "scale", node)
        return self.generic_visit(node)


class Shortcut(ast.NodeTransformer):
    """Replace an addition by its shortcut."""

    def __init__(self, cut: Sum) -> None:
        self.cut = cut

    def visit(self, node: ast.AST) -> Any:
        if is_at(node, self.cut.place):
            return _operands(node, self.cut)[0]
        return self.generic_visit(node)


class SelectSamples(ast.NodeTransformer):
    """`x` -> `gate.select(x)` for local variables: the samples that a branch runs on."""

    def __init__(self, variables: set[str], gate: str) -> None:
        self.variables, self.gate = variables, gate

    def visit_Name(self, node: ast.Name) -> Any:
        if node.id in self.variables and isinstance(node.ctx, ast.Load):
            return ast.copy_location(of_gate(self.gate, "select", node), node)
        return node


def _operands(node: ast.AST, cut: Sum) -> tuple[ast.expr, ast.expr]:
    """Shortcut and branch of an addition: `a + b`, `torch.add(a, b)`, `a.add(b)`, or `f(a, b)`."""
    if cut.within is not None and isinstance(node, ast.Call):
        position, name = cut.within
        named = [keyword.value for keyword in node.keywords if keyword.arg == name]
        shortcut = (node.args[position : position + 1] if position is not None else []) + named
        if len(shortcut) != 1 or not isinstance(shortcut[0], ast.Name):
            raise UnsupportedBlockError(f"{cut}: a function adds something that is no variable")
        return shortcut[0], node
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        pair = node.left, node.right
    elif isinstance(node, ast.Call) and not node.keywords and isinstance(node.func, ast.Attribute):
        if len(node.args) == 2 and node.func.attr == "add":
            pair = node.args[0], node.args[1]
        elif len(node.args) == 1 and node.func.attr in ("add", "add_"):
            pair = node.func.value, node.args[0]
        else:
            raise UnsupportedBlockError(f"{cut.place}: a call that is not a plain addition")
    else:
        raise UnsupportedBlockError(f"{cut.place}: an addition inside another function")
    return pair if cut.shortcut == "left" else (pair[1], pair[0])


def is_at(node: ast.AST, place: Place) -> bool:
    return (
        isinstance(node, ast.BinOp | ast.Call | ast.AugAssign) and _position(node) == place.position
    )


def _position(node: ast.stmt | ast.expr) -> tuple[int, int | None, int, int | None]:
    return node.lineno, node.end_lineno, node.col_offset, node.end_col_offset


def _maybe_copy(shortcut: ast.expr, copied: bool) -> ast.expr:
    return ast.Call(ast.Attribute(shortcut, "clone", ast.Load()), [], []) if copied else shortcut


def is_open(gate: str) -> ast.expr:
    return ast.Attribute(ast.Name(gate, ast.Load()), "open", ast.Load())


def call(function: str, *arguments: ast.expr | str) -> ast.Call:
    values = [ast.Name(a, ast.Load()) if isinstance(a, str) else a for a in arguments]
    return ast.Call(ast.Name(function, ast.Load()), values, [])


def of_gate(gate: str, method: str, *arguments: ast.expr) -> ast.Call:
    """`gate.method(*arguments)`."""
    function = ast.Attribute(ast.Name(gate, ast.Load()), method, ast.Load())
    return ast.Call(function, list(arguments), [])
