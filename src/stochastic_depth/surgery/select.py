"""Select the samples that a branch runs on, where the branch begins."""

import ast
from typing import Any

from stochastic_depth.surgery.syntax import of_gate


class SelectSamples(ast.NodeTransformer):
    """`x` -> `gate.select(x)` for local variables: the samples that a branch runs on.

    A value from outside of the branch is selected from, and only such: what the branch has computed
    is of the drawn samples already, and may be as long as the batch in another dimension.
    """

    def __init__(self, variables: set[str], gate: str) -> None:
        self.outside, self.gate = variables, gate

    def visit_Name(self, node: ast.Name) -> Any:
        if node.id in self.outside and isinstance(node.ctx, ast.Load):
            return ast.copy_location(of_gate(self.gate, "select", node), node)
        return node

    def visit_Assign(self, node: ast.Assign) -> Any:
        node.value = self.visit(node.value)
        self.outside = self.outside - set().union(*map(_stored, node.targets))
        return node

    def visit_If(self, node: ast.If) -> Any:
        node.test = self.visit(node.test)
        before, after = self.outside, set[str]()
        for arm in (node.body, node.orelse):
            self.outside = before
            arm[:] = [self.visit(statement) for statement in arm]
            after |= self.outside
        self.outside = after
        return node


def in_source(node: ast.AST) -> tuple[int, int]:
    """Where it stands in the source, for sorting."""
    return getattr(node, "lineno", 0), getattr(node, "col_offset", 0)


def _stored(target: ast.AST) -> set[str]:
    """The variables that an assignment to `target` gives a value."""
    names = (node for node in ast.walk(target) if isinstance(node, ast.Name))
    return {node.id for node in names if isinstance(node.ctx, ast.Store)}
