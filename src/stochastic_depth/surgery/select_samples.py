"""Select the samples that a branch runs on, where the branch begins."""

import ast
from collections.abc import Iterable
from typing import Any

from stochastic_depth.surgery.liveness import (
    assign,
    changed_in_place,
    defines,
    surely_defines,
    uses,
)
from stochastic_depth.surgery.syntax import call


def select_samples(
    tree: ast.FunctionDef,
    branch: Iterable[ast.AST],
    shared: Iterable[ast.AST],
    variables: set[str],
    gate: str,
) -> None:
    """Make the expressions and statements of a branch use the drawn samples, in place.

    Args:
        shared: statements that run for all samples, because others need them too.
        variables: of the method.
        gate: the name of the variable with the gate.
    """
    module = tree.args.args[0].arg
    for_all = set(map(id, shared))
    selecting = _Selecting(variables, gate, module, _first_bound(tree))
    for node in sorted([*branch, *shared], key=_in_source):
        if id(node) in for_all:
            selecting.outside |= defines(node)
        elif isinstance(node, ast.stmt):
            selecting.visit(node)
        else:
            selecting.generic_visit(node)
    _Inserting(selecting.before).visit(tree)
    ast.fix_missing_locations(tree)


class _Selecting(ast.NodeTransformer):
    """`x` -> `_samples(self, gate, x, "x")` for variables from outside of the branch.

    Values computed in the branch are of the drawn samples already. For a statement that changes a
    variable from outside, such as a loop, the samples are selected once before it.
    """

    def __init__(
        self, variables: set[str], gate: str, module: str, bound: dict[str, tuple[int, int]]
    ) -> None:
        self.outside, self.gate, self.module, self.bound = variables, gate, module, bound
        self.before: dict[int, list[ast.stmt]] = {}

    def visit_Name(self, node: ast.Name) -> Any:
        if node.id in self.outside and isinstance(node.ctx, ast.Load):
            return ast.copy_location(self._samples(node), node)
        return node

    def _samples(self, name: ast.Name) -> ast.Call:
        place = ast.Constant(f"{self.gate}.{name.id}")
        return call("_samples", self.module, self.gate, name, place)

    def _select_before(self, node: ast.stmt, names: Iterable[str]) -> None:
        here = _in_source(node)
        for name in sorted(self.outside.intersection(names)):
            if self.bound.get(name, here) >= here:  # first assigned by the statement itself
                continue
            value = self._samples(ast.Name(name, ast.Load()))
            self.before.setdefault(id(node), []).append(assign(name, value))
            self.outside = self.outside - {name}

    def visit_Assign(self, node: ast.Assign) -> Any:
        node.value = self.visit(node.value)
        self.outside = self.outside - frozenset[str]().union(*map(defines, node.targets))
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        node.value = node.value and self.visit(node.value)
        self.outside = self.outside - defines(node.target)
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        self._select_before(node, defines(node.target))
        node.value = self.visit(node.value)
        return node

    def visit_Expr(self, node: ast.Expr) -> Any:
        changed = changed_in_place(node)
        self._select_before(node, [] if changed is None else [changed])
        return self.generic_visit(node)

    def visit_For(self, node: ast.For) -> Any:
        self._select_before(node, defines(node) & uses(node) - defines(node.target))
        node.iter = self.visit(node.iter)
        self.outside = self.outside - defines(node.target)
        self._visit_all(node.body)
        self._visit_all(node.orelse)
        return node

    def visit_While(self, node: ast.While) -> Any:
        self._select_before(node, defines(node) & uses(node))
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> Any:
        self._select_before(node, defines(node) - surely_defines(node))
        node.test = self.visit(node.test)
        before, after = self.outside, set[str]()
        for arm in (node.body, node.orelse):
            self.outside = before
            self._visit_all(arm)
            after |= self.outside
        self.outside = after
        return node

    def _visit_all(self, statements: list[ast.stmt]) -> None:
        statements[:] = [self.visit(statement) for statement in statements]


class _Inserting(ast.NodeTransformer):
    """Puts statements before others."""

    def __init__(self, before: dict[int, list[ast.stmt]]) -> None:
        self.before = before

    def visit(self, node: ast.AST) -> Any:
        self.generic_visit(node)
        return [*self.before[id(node)], node] if id(node) in self.before else node


def _first_bound(tree: ast.FunctionDef) -> dict[str, tuple[int, int]]:
    """Where in the source each variable of a function gets a value first."""
    first = {a.arg: (0, 0) for a in ast.walk(tree.args) if isinstance(a, ast.arg)}
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    stores = [node for node in names if not isinstance(node.ctx, ast.Load)]
    for node in sorted(stores, key=_in_source):
        first.setdefault(node.id, _in_source(node))
    return first


def _in_source(node: ast.AST) -> tuple[int, int]:
    """Where it stands in the source, for sorting."""
    return getattr(node, "lineno", 0), getattr(node, "col_offset", 0)
