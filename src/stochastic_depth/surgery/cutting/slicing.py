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
from stochastic_depth.surgery.cutting.backward import Backward, Needed, negated
from stochastic_depth.surgery.cutting.liveness import defines, is_steady, surely_defines, uses
from stochastic_depth.surgery.cutting.rewriting import (
    ReplaceSum,
    SelectSamples,
    Shortcut,
    call,
    cut_arguments,
    cut_statement,
    is_at,
    is_open,
)
from stochastic_depth.surgery.discovery.cuts import Argument, Parameter, Place, Sliced

SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr)


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
            select_samples = SelectSamples(set(others), f"_gate_{number}")
            for node in branch:
                select_samples.generic_visit(node)
            ast.fix_missing_locations(tree)
    names: list[ast.expr] = [ast.Name(f"_gate_{n}", ast.Store()) for n in range(len(cuts))]
    drawn = call("_gates", ast.Name(module, ast.Load()))
    tree.body.insert(0, ast.Assign([ast.Tuple(names, ast.Store())], drawn))
    return _compiled(function, tree, {"_gates": gates})


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
    return any(is_at(node, place) for node in inside)


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
        closed, branch = cut_arguments(statement, cut, gate)
    elif isinstance(statement, ast.AugAssign) and is_at(statement, cut.place):
        opened, closed, branch = cut_statement(statement, cut, gate, copy_shortcut)
        block[index] = ast.If(is_open(gate), opened, [closed])
    else:
        closed = Shortcut(cut).visit(copy.deepcopy(statement))
        replace = ReplaceSum(cut, gate, copy_shortcut)
        block[index] = replace.visit(statement)
        branch = [replace.branch]
    needed.before(closed, defines(closed))
    back = Backward(is_open(gate), cut.idle, branch)
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
        if not any(is_at(node, place) for node in ast.walk(statement)):
            continue
        for later in reversed(block[index + 1 :]):
            needed.before(later, surely_defines(later))
        if isinstance(statement, SIMPLE):
            return [(block, index)], needed
        if isinstance(statement, ast.If | ast.With):
            for inner in (statement.body, getattr(statement, "orelse", [])):
                if any(is_at(node, place) for part in inner for node in ast.walk(part)):
                    path, needed = _find(inner, place, needed)
                    return [(block, index), *path], needed
        raise UnsupportedBlockError(f"{place}: an addition inside a {type(statement).__name__}")
    raise UnsupportedBlockError(f"{place}: the source has changed since it was imported")


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
