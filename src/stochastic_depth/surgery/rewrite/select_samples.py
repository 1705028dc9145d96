"""Select the drawn samples from every value that enters a branch, for subset gates.

`select_in_source` rewrites a method so that it calls `select_drawn`, which selects the samples when
the method runs. The length of a tensor does not say whether it holds samples: a mask [time, time]
may be as long as the batch. So the model runs on all samples of the example, and on half of them. A
value that is half as long in the second pass holds samples, and so does the value at the same
position in the code in every later pass.
"""

import ast
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.errors import GateError
from stochastic_depth.gates import Gate
from stochastic_depth.surgery.rewrite.liveness import assign
from stochastic_depth.surgery.rewrite.syntax import call
from stochastic_depth.surgery.rewrite.variables import (
    changed_in_place,
    defines,
    surely_defines,
    uses,
)
from stochastic_depth.tensors import map_structure

HOLDS_SAMPLES = "_stochastic_depth_samples"
"""The attribute of a module that says, by key, which tensors that enter a branch hold samples."""

SeenShapes = dict[tuple[nn.Module, Hashable], list[tuple[int, ...]]]
"""The shapes of the tensors that entered branches, by module and key."""

_recording: ContextVar[SeenShapes | None] = ContextVar("recording", default=None)


@contextmanager
def record_shapes() -> Iterator[SeenShapes]:
    """While entered, record the shapes of tensors that enter branches in this thread.

    Gates must be open for all samples.
    """
    seen: SeenShapes = {}
    token = _recording.set(seen)
    try:
        yield seen
    finally:
        _recording.reset(token)


def select_drawn(module: nn.Module, gate: Gate, value: Any, key: Hashable) -> Any:
    """Select the drawn samples from a value that enters a branch, [batch, ...] -> [k, ...].

    Args:
        module: the module whose code runs.
        value: a tensor, or nested tuples, lists and dicts, in which each tensor has its own key.
        key: identifies the position in the code, and the variable.

    Raises:
        GateError: when a tensor is as long as the batch and had no such key on the example.
    """
    samples = gate.samples
    if samples is None:
        return value

    def select(tensor: Tensor, key: Hashable) -> Tensor:
        seen = None if torch.compiler.is_compiling() else _recording.get()
        if seen is not None:
            seen.setdefault((module, key), []).append(tuple(tensor.shape))
            return tensor
        if tensor.ndim == 0 or len(tensor) != gate.batch or len(samples) == gate.batch:
            return tensor
        known = module.__dict__.get(HOLDS_SAMPLES, {})
        if key not in known:
            raise GateError(
                f"a tensor of shape {list(tensor.shape)} that the example did not have enters a "
                f"branch of {type(module).__name__}, and it is not known whether its first "
                f"dimension is the batch ({gate.batch}): give sd.apply an example with this tensor"
            )
        return tensor.index_select(0, samples.to(tensor.device)) if known[key] else tensor

    return map_structure(select, value, key)


def select_in_source(
    tree: ast.FunctionDef,
    branch: Iterable[ast.AST],
    shared: Iterable[ast.AST],
    variables: set[str],
    gate: str,
) -> None:
    """Make the expressions and statements of a branch use the drawn samples, in place.

    Args:
        shared: statements that run for all samples, because other code needs their results too.
        variables: the names of all variables of the method.
        gate: the name of the variable that holds the gate.
    """
    module = tree.args.args[0].arg
    for_all = set(map(id, shared))
    selecting = _SelectInSource(variables, gate, module, _first_bound(tree))
    for node in sorted([*branch, *shared], key=_in_source):
        if id(node) in for_all:
            selecting.outside |= defines(node)
        elif isinstance(node, ast.stmt):
            selecting.visit(node)
        else:
            selecting.generic_visit(node)
    _InsertBefore(selecting.before).visit(tree)
    ast.fix_missing_locations(tree)


class _SelectInSource(ast.NodeTransformer):
    """Replaces `x` by `_select(self, gate, x, "x")` if the variable is set outside the branch.

    A value that is computed in the branch holds the drawn samples already. If a statement such as a
    loop changes a variable from outside, the samples are selected once, before the statement.
    """

    def __init__(
        self, variables: set[str], gate: str, module: str, bound: dict[str, tuple[int, int]]
    ) -> None:
        self.outside, self.gate, self.module, self.bound = variables, gate, module, bound
        self.before: dict[int, list[ast.stmt]] = {}

    def visit_Name(self, node: ast.Name) -> Any:
        if node.id in self.outside and isinstance(node.ctx, ast.Load):
            return ast.copy_location(self._select(node), node)
        return node

    def _select(self, name: ast.Name) -> ast.Call:
        key = ast.Constant(f"{self.gate}.{name.id}")
        return call("_select", self.module, self.gate, name, key)

    def _select_before(self, node: ast.stmt, names: Iterable[str]) -> None:
        here = _in_source(node)
        for name in sorted(self.outside.intersection(names)):
            if self.bound.get(name, here) >= here:  # first assigned by the statement itself
                continue
            value = self._select(ast.Name(name, ast.Load()))
            self.before.setdefault(id(node), []).append(assign(name, value))
            self.outside = self.outside - {name}

    def visit_Assign(self, node: ast.Assign) -> Any:
        self._visit_items(node, node.targets)
        node.value = self.visit(node.value)
        self.outside = self.outside - frozenset[str]().union(*map(defines, node.targets))
        return node

    def _visit_items(self, node: ast.stmt, targets: Iterable[ast.expr]) -> None:
        """Select what an assignment to an item (`y[i] = f`) changes, and its index."""
        for item in [part for target in targets for part in ast.walk(target)]:
            if isinstance(item, ast.Subscript) and isinstance(item.ctx, ast.Store):
                self._select_before(node, defines(item))
                item.slice = self.visit(item.slice)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        node.value = node.value and self.visit(node.value)
        self.outside = self.outside - defines(node.target)
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        self._visit_items(node, [node.target])
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


class _InsertBefore(ast.NodeTransformer):
    """Inserts statements before others, which are given by their `id`."""

    def __init__(self, before: dict[int, list[ast.stmt]]) -> None:
        self.before = before

    def visit(self, node: ast.AST) -> Any:
        self.generic_visit(node)
        return [*self.before[id(node)], node] if id(node) in self.before else node


def _first_bound(tree: ast.FunctionDef) -> dict[str, tuple[int, int]]:
    """The line and column at which each variable of a function gets its first value."""
    first = {a.arg: (0, 0) for a in ast.walk(tree.args) if isinstance(a, ast.arg)}
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    stores = [node for node in names if not isinstance(node.ctx, ast.Load)]
    for node in sorted(stores, key=_in_source):
        first.setdefault(node.id, _in_source(node))
    return first


def _in_source(node: ast.AST) -> tuple[int, int]:
    """The line and column of a node in the source, for sorting."""
    return getattr(node, "lineno", 0), getattr(node, "col_offset", 0)
