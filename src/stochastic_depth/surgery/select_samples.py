"""Select the drawn samples from every value that enters a branch, for subset gates.

`select_samples` puts the selection into the source of a method; `samples` does it when the method
runs. The length of a tensor does not say whether it holds samples: a mask [time, time] may be as
long as the batch. So the model runs on all samples of the example and on half of them. A value that
has half the length in the second pass is taken to hold samples, at its place in the code, in every
later pass.
"""

import ast
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.errors import GateError
from stochastic_depth.gates import Gate
from stochastic_depth.surgery.liveness import (
    assign,
    changed_in_place,
    defines,
    surely_defines,
    uses,
)
from stochastic_depth.surgery.syntax import call

SAMPLES = "_stochastic_depth_samples"
"""The attribute of a module that says at which places of its code a tensor holds samples."""

Seen = dict[tuple[nn.Module, Hashable], list[tuple[int, ...]]]
"""The shapes of the tensors that entered branches, by module and place in its code."""

_seen: list[Seen] = []


@contextmanager
def noted() -> Iterator[Seen]:
    """While entered, record shapes that enter branches. Gates must be open for all samples."""
    seen: Seen = {}
    _seen.append(seen)
    try:
        yield seen
    finally:
        _seen.pop()


def samples(module: nn.Module, gate: Gate, value: Any, place: Hashable) -> Any:
    """Select the drawn samples from a value that enters a branch, [batch, ...] -> [k, ...].

    Args:
        module: the module whose code runs.
        value: a tensor; or tuples, lists and mappings, each of whose tensors has a place of its
            own.
        place: identifies the place in the code, and the variable.

    Raises:
        GateError: when a tensor is as long as the batch and was not seen at this place on the
            example.
    """
    if gate.samples is None:
        return value
    if isinstance(value, Tensor):
        if not torch.compiler.is_compiling() and _seen:
            _seen[-1].setdefault((module, place), []).append(tuple(value.shape))
            return value
        if value.ndim == 0 or len(value) != gate.batch or len(gate.samples) == gate.batch:
            return value
        known = module.__dict__.get(SAMPLES, {})
        if place not in known:
            raise GateError(
                f"a tensor {list(value.shape)} that was not there on the example enters a branch "
                f"of {type(module).__name__}, and may or may not hold the {gate.batch} samples: "
                "give sd.apply an example with this tensor"
            )
        return value.index_select(0, gate.samples.to(value.device)) if known[place] else value
    if type(value) in (tuple, list):
        parts = [samples(module, gate, each, (place, n)) for n, each in enumerate(value)]
        changed = any(new is not old for new, old in zip(parts, value, strict=True))
        return type(value)(parts) if changed else value  # which the branch may append to
    if type(value) is dict:
        return {key: samples(module, gate, each, (place, key)) for key, each in value.items()}
    return value


def select_samples(
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
    """Replaces `x` by `_samples(self, gate, x, "x")` for variables from outside the branch.

    A value that is computed in the branch has the drawn samples already. For a statement that
    changes a variable from outside, such as a loop, the samples are selected once before the
    statement.
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
