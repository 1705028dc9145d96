"""Rewrite a method so that its residual additions have gates.

For each addition the method is cut into what only the branch needs and all the rest. The first is
put under `if gate.open:`, so that a closed gate runs none of it, and the addition becomes its
shortcut. Where a method only computes what a module that it calls will add, it is cut at that call.
"""

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

from stochastic_depth.errors import UnsupportedBlockError
from stochastic_depth.gates import Gate
from stochastic_depth.residual import part, rescaled, scaled
from stochastic_depth.surgery.backward import Backward, Needed, assign, negated
from stochastic_depth.surgery.cuts import Argument, Parameter, Place, Sliced, Sum
from stochastic_depth.surgery.liveness import defines, is_steady, surely_defines, uses

SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr)
NAMES = {"_scaled": scaled, "_rescaled": rescaled, "_part": part}
"""What generated code calls, besides `_gates`."""


def slice_method(
    function: FunctionType,
    cuts: Sequence[Sliced],
    gates: Callable[[Any], Sequence[Gate]],
    copy_shortcut: bool,
    select: bool,
) -> FunctionType:
    """`function`, with a gate at each of `cuts`, in order of execution.

    Args:
        gates: called with the module in every call of the method; gives the gates of the cuts.
        copy_shortcut: whether to clone the shortcut under a closed gate, because what follows the
            addition may overwrite it.
        select: whether a gate may ask for some of the samples only.

    Raises:
        UnsupportedBlockError: when the source is not there or not of a form that can be cut.
    """
    tree = _definition(function)
    module, *others = function.__code__.co_varnames + function.__code__.co_cellvars
    for number, cut in enumerate(cuts):
        branch, *_ = _cut(tree, cut, f"_gate_{number}", copy_shortcut)
        if select:
            select_samples = _SelectSamples(set(others), f"_gate_{number}")
            for node in branch:
                select_samples.generic_visit(node)
            ast.fix_missing_locations(tree)
    names: list[ast.expr] = [ast.Name(f"_gate_{n}", ast.Store()) for n in range(len(cuts))]
    drawn = _call("_gates", ast.Name(module, ast.Load()))
    tree.body.insert(0, ast.Assign([ast.Tuple(names, ast.Store())], drawn))
    return _compiled(function, tree, {**NAMES, "_gates": gates})


def skipped_when_closed(cut: Sliced) -> tuple[bool, tuple[Parameter, ...]]:
    """Whether a closed gate at `cut` skips any call, and parameters that only the branch needs.

    Returns:
        The parameters with their positions in a call, if they have one, and names.
    """
    tree = _definition(inspect.unwrap(vars(cut.place.kind)[cut.place.method]))
    used = uses(tree)
    branch, shared, needed = _cut(tree, cut, "_gate", False)
    both = [*branch, *shared]
    calls = any(isinstance(node, ast.Call) for part in both for node in ast.walk(part))
    positional = [argument.arg for argument in [*tree.args.posonlyargs, *tree.args.args][1:]]
    named = [(None, argument.arg) for argument in tree.args.kwonlyargs]
    parameters = [*enumerate(positional), *named]
    return calls, tuple((n, name) for n, name in parameters if name in used - needed)


def in_loop(place: Place) -> bool:
    """Whether the expression at `place` stands in a loop of its method."""
    loops = ast.For | ast.While
    tree = _definition(inspect.unwrap(vars(place.kind)[place.method]))
    inside = (n for loop in ast.walk(tree) if isinstance(loop, loops) for n in ast.walk(loop))
    return any(_is_at(node, place) for node in inside)


def _definition(function: FunctionType) -> ast.FunctionDef:
    """The syntax tree of `function`, its positions those in the file."""
    try:
        lines, first = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError) as error:
        raise UnsupportedBlockError(f"{function.__qualname__} has no source to cut") from error
    if not isinstance(tree, ast.FunctionDef) or not tree.args.args:
        raise UnsupportedBlockError(f"{function.__qualname__} is no plain method")
    ast.increment_lineno(tree, first - 1)
    indent = len(lines[0]) - len(lines[0].lstrip())
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt | ast.expr) and node.end_col_offset is not None:
            node.col_offset += indent
            node.end_col_offset += indent
    return tree


def _cut(
    tree: ast.FunctionDef, cut: Sliced, gate: str, copy_shortcut: bool
) -> tuple[list[ast.AST], list[ast.AST], frozenset[str]]:
    """Put what only the branch at `cut` needs under `gate`, in place.

    Returns:
        The expressions and statements of the branch alone, the statements that others may need
        too, and the variables that the method needs from outside under a closed gate.
    """
    path, needed = _find(tree.body, cut.place, Needed())
    block, index = path.pop()
    statement = block[index]
    branch: list[ast.AST]
    if isinstance(cut, Argument):
        closed, branch = _cut_arguments(statement, cut, gate)
    elif isinstance(statement, ast.AugAssign) and _is_at(statement, cut.place):
        opened, closed, branch = _cut_statement(statement, cut, gate, copy_shortcut)
        block[index] = ast.If(_is_open(gate), opened, [closed])
    else:
        closed = _Shortcut(cut).visit(copy.deepcopy(statement))
        replace = _ReplaceSum(cut, gate, copy_shortcut)
        block[index] = replace.visit(statement)
        branch = [replace.branch]
    needed.before(closed, defines(closed))
    back = Backward(_is_open(gate), cut.idle, branch)
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
        back.through(block, index, needed)
    ast.fix_missing_locations(tree)
    return back.branch, back.shared, needed.live | frozenset(needed.maybe)


def _find(
    block: list[ast.stmt], place: Place, needed: Needed
) -> tuple[list[tuple[list[ast.stmt], int]], Needed]:
    """Blocks and indices from the outermost to the statement at `place`; what it must leave."""
    for index, statement in enumerate(block):
        if not any(_is_at(node, place) for node in ast.walk(statement)):
            continue
        for later in reversed(block[index + 1 :]):
            needed.before(later, surely_defines(later))
        if isinstance(statement, SIMPLE):
            return [(block, index)], needed
        if isinstance(statement, ast.If | ast.With):
            for inner in (statement.body, getattr(statement, "orelse", [])):
                if any(_is_at(node, place) for part in inner for node in ast.walk(part)):
                    path, needed = _find(inner, place, needed)
                    return [(block, index), *path], needed
        raise UnsupportedBlockError(f"{place}: an addition inside a {type(statement).__name__}")
    raise UnsupportedBlockError(f"{place}: the source has changed since it was imported")


def _cut_statement(
    statement: ast.AugAssign, cut: Sum, gate: str, copy_shortcut: bool
) -> tuple[list[ast.stmt], ast.stmt, list[ast.AST]]:
    """`x += f` under an open and under a closed gate, and its branch."""
    if not isinstance(statement.target, ast.Name) or not isinstance(statement.op, ast.Add):
        raise UnsupportedBlockError(f"{cut.place}: not an addition to a variable")
    name = statement.target.id
    opened = copy.deepcopy(statement)
    if cut.shortcut == "left":
        branch: ast.expr = opened.value
        opened.value = _call("_scaled", branch, gate)
        shortcut: ast.expr = ast.Name(name, ast.Load())
        before: list[ast.stmt] = []
    else:
        branch, shortcut = ast.Name(name, ast.Load()), statement.value
        before = [assign(name, _call("_scaled", branch, gate))]
    return [*before, opened], assign(name, _maybe_copy(shortcut, copy_shortcut)), [branch]


class _ReplaceSum(ast.NodeTransformer):
    """`a + b` -> `a + _scaled(b, gate) if gate.open else a`."""

    def __init__(self, cut: Sum, gate: str, copy_shortcut: bool) -> None:
        self.cut, self.gate, self.copy_shortcut = cut, gate, copy_shortcut
        self.branch: ast.expr = ast.Constant(None)

    def visit(self, node: ast.AST) -> Any:
        if not _is_at(node, self.cut.place):
            return self.generic_visit(node)
        shortcut, self.branch = _operands(node, self.cut)
        if self.cut.within is None:
            opened = _Scale(self.branch, self.gate).visit(node)
        else:
            opened = _call("_rescaled", self.branch, copy.deepcopy(shortcut), self.gate)
        closed = _maybe_copy(copy.deepcopy(shortcut), self.copy_shortcut)
        return ast.IfExp(_is_open(self.gate), opened, closed)


def _cut_arguments(statement: ast.stmt, cut: Argument, gate: str) -> tuple[ast.stmt, list[ast.AST]]:
    """`f(a, b)` -> `f(a if gate.open else None, b)`, in place; the closed form, and the branch."""
    closed = copy.deepcopy(statement)
    _exchange_arguments(closed, cut, lambda _: ast.Constant(None))
    branch = _exchange_arguments(
        statement, cut, lambda value: ast.IfExp(_is_open(gate), value, ast.Constant(None))
    )
    return closed, branch


def _exchange_arguments(
    statement: ast.stmt, cut: Argument, exchange: Callable[[ast.expr], ast.expr]
) -> list[ast.AST]:
    """Put something else in place of the arguments of a call; returns what they were."""
    call = next(node for node in ast.walk(statement) if _is_at(node, cut.place))
    before: list[ast.AST] = []
    if isinstance(call, ast.Call) and not any(isinstance(a, ast.Starred) for a in call.args):
        positions = {n for n, _ in cut.arguments if n is not None}
        names = {name for _, name in cut.arguments if name is not None}
        for n, value in enumerate(call.args):
            if n in positions:
                before.append(value)
                call.args[n] = exchange(value)
        for keyword in call.keywords:
            if keyword.arg in names:
                before.append(keyword.value)
                keyword.value = exchange(keyword.value)
    if len(before) != len(cut.arguments):
        raise UnsupportedBlockError(f"{cut.place}: not a plain call of the module that adds")
    return before


class _Scale(ast.NodeTransformer):
    """Replace one node, found by identity, by `_scaled(node, gate)`."""

    def __init__(self, branch: ast.AST, gate: str) -> None:
        self.branch, self.gate = branch, gate

    def visit(self, node: ast.AST) -> Any:
        if node is self.branch and isinstance(node, ast.expr):
            return _call("_scaled", node, self.gate)
        return self.generic_visit(node)


class _Shortcut(ast.NodeTransformer):
    """Replace an addition by its shortcut."""

    def __init__(self, cut: Sum) -> None:
        self.cut = cut

    def visit(self, node: ast.AST) -> Any:
        if _is_at(node, self.cut.place):
            return _operands(node, self.cut)[0]
        return self.generic_visit(node)


class _SelectSamples(ast.NodeTransformer):
    """`x` -> `_part(x, gate)` for local variables: the samples that a branch runs on."""

    def __init__(self, variables: set[str], gate: str) -> None:
        self.variables, self.gate = variables, gate

    def visit_Name(self, node: ast.Name) -> Any:
        if node.id in self.variables and isinstance(node.ctx, ast.Load):
            return ast.copy_location(_call("_part", node, self.gate), node)
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


def _is_at(node: ast.AST, place: Place) -> bool:
    return (
        isinstance(node, ast.BinOp | ast.Call | ast.AugAssign) and _position(node) == place.position
    )


def _position(node: ast.stmt | ast.expr) -> tuple[int, int | None, int, int | None]:
    return node.lineno, node.end_lineno, node.col_offset, node.end_col_offset


def _maybe_copy(shortcut: ast.expr, copied: bool) -> ast.expr:
    return ast.Call(ast.Attribute(shortcut, "clone", ast.Load()), [], []) if copied else shortcut


def _is_open(gate: str) -> ast.expr:
    return ast.Attribute(ast.Name(gate, ast.Load()), "open", ast.Load())


def _call(function: str, *arguments: ast.expr | str) -> ast.Call:
    values = [ast.Name(a, ast.Load()) if isinstance(a, str) else a for a in arguments]
    return ast.Call(ast.Name(function, ast.Load()), values, [])


def _compiled(
    function: FunctionType, tree: ast.FunctionDef, names: dict[str, Callable[..., Any]]
) -> FunctionType:
    """A function from `tree` with the globals, defaults and closure of `function`."""
    free = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    values = {**names, **{name: cell.cell_contents for name, cell in free.items()}}
    tree.decorator_list, tree.returns = [], None
    arguments = tree.args
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [value and ast.Constant(None) for value in arguments.kw_defaults]
    module = ast.parse(f"def _factory({', '.join(values)}): return {tree.name}")
    assert isinstance(module.body[0], ast.FunctionDef)
    module.body[0].body.insert(0, tree)
    ast.fix_missing_locations(module)
    made: dict[str, Any] = {}
    exec(compile(module, function.__code__.co_filename, "exec"), function.__globals__, made)
    result: FunctionType = made["_factory"](**values)
    result.__defaults__, result.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    result.__qualname__, result.__doc__ = function.__qualname__, function.__doc__
    return result
