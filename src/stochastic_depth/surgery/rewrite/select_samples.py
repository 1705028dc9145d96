"""Select the drawn samples from every value that enters a branch, for subset gates.

`select_in_source` rewrites a method so that it calls `select_drawn`, which selects the samples when
the method runs. The length of a tensor does not say whether it holds samples: a mask [time, time]
may be as long as the batch. So the model runs on all samples of the example, and on half of them. A
value that is half as long in the second pass holds samples, and so does the value at the same
position in the code in every later pass.
"""

import ast
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.errors import GateError
from stochastic_depth.gates import Gate
from stochastic_depth.surgery.rewrite.liveness import assign
from stochastic_depth.surgery.rewrite.syntax import call, module_of
from stochastic_depth.surgery.rewrite.variables import defines, stored
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
    tree: ast.FunctionDef, branch: Sequence[ast.AST], shared: Sequence[ast.AST], gate: str
) -> None:
    """Make the expressions and statements of a branch use the drawn samples, in place.

    Args:
        shared: statements that run for all samples, because other code needs their results too.
        gate: the name of the variable that holds the gate.
    """
    parts, for_all = [*branch, *shared], set[ast.AST](shared)
    inside = {node for part in parts for node in ast.walk(part)}
    for_all |= {name for name in stored(tree) if name not in inside}
    selecting = _SelectInSource(tree, gate)
    for node in sorted({*parts, *for_all}, key=_in_source):
        if node in for_all:
            selecting.outside |= defines(node)
        elif isinstance(node, ast.If):  # puts a statement under the gate
            selecting.visit_all(node.body)
        else:
            selecting.generic_visit(node)
    ast.fix_missing_locations(tree)


class _SelectInSource(ast.NodeTransformer):
    """Replaces `x` by `_select(self, gate, x, "x")` if the variable is set outside the branch.

    A value that is computed in the branch holds the drawn samples already.
    """

    def __init__(self, tree: ast.FunctionDef, gate: str) -> None:
        self.module, self.gate = module_of(tree), gate
        parameters = {a.arg for a in ast.walk(tree.args) if isinstance(a, ast.arg)}
        self.outside = parameters - {self.module}
        """The variables that have been set outside the branch so far, for all samples."""

    def visit_Name(self, node: ast.Name) -> Any:
        if node.id in self.outside and isinstance(node.ctx, ast.Load):
            return ast.copy_location(self._select(node), node)
        return node

    def _select(self, name: ast.Name) -> ast.Call:
        key = ast.Constant(f"{self.gate}.{name.id}")
        return call("_select", self.module, self.gate, name, key)

    def visit_Assign(self, node: ast.Assign | ast.AnnAssign) -> Any:
        self.generic_visit(node)
        self.outside -= defines(node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        return self.visit_Assign(node)  # its annotation is never evaluated

    def visit_For(self, node: ast.For) -> list[ast.stmt]:
        node.iter = self.visit(node.iter)
        changed = self.outside & (defines(node) - defines(node.target))
        self.outside -= defines(node)
        self.visit_all(node.body)
        self.visit_all(node.orelse)
        return [*map(self._selected, sorted(changed)), node]

    def visit_If(self, node: ast.If) -> Any:
        node.test = self.visit(node.test)
        before, after = self.outside, []
        for arm in (node.body, node.orelse):
            self.outside = set(before)
            self.visit_all(arm)
            after.append(self.outside)
        self.outside = after[0] & after[1]
        for arm, outside in zip((node.body, node.orelse), after, strict=True):
            for name in sorted(outside - self.outside):  # set in the other arm
                arm.append(self._selected(name))
        return node

    def _selected(self, name: str) -> ast.stmt:
        """The statement that replaces a variable by its drawn samples."""
        return assign(name, self._select(ast.Name(name, ast.Load())))

    def visit_all(self, statements: list[ast.stmt]) -> None:
        visited = [self.visit(statement) for statement in statements]
        statements[:] = [n for new in visited for n in (new if isinstance(new, list) else [new])]


def _in_source(node: ast.AST) -> tuple[int, int]:
    """The line and column of a node in the source, for sorting."""
    return getattr(node, "lineno", 0), getattr(node, "col_offset", 0)
