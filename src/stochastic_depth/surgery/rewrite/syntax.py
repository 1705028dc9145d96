"""The syntax trees of methods, and of expressions in them."""

import ast
import copy
import functools
import inspect
from collections.abc import Callable
from types import CellType, CodeType, FunctionType
from typing import Any

from stochastic_depth.errors import UnsupportedBlockError
from stochastic_depth.surgery.edits import AdditionEdit
from stochastic_depth.surgery.frames import SourceLocation

_NO_SOURCE = (OSError, TypeError, SyntaxError, IndexError)
"""The errors of looking for a source that is missing."""
_BRANCHING = (ast.If, ast.IfExp, ast.BoolOp, ast.For, ast.While, ast.comprehension, ast.Try)
_BRANCHING += (ast.Match,)


def operands(node: ast.AST, edit: AdditionEdit) -> tuple[ast.expr, ast.expr]:
    """The shortcut and the branch of an addition, given the node at its location.

    The node is one of `a + b`, `torch.add(a, b)`, `a.add(b)`, `sum([a, b])`, `torch.addcmul(a, b,
    c)`, or a call `f(a, b)` of a function that adds.

    Raises:
        UnsupportedBlockError: when it has a different form.
    """
    if edit.within is not None and isinstance(node, ast.Call):
        position, name = edit.within
        named = [keyword.value for keyword in node.keywords if keyword.arg == name]
        shortcut = (node.args[position : position + 1] if position is not None else []) + named
        if len(shortcut) != 1 or not isinstance(shortcut[0], ast.Name):
            raise UnsupportedBlockError(
                f"{edit}: the shortcut must be passed to the function that adds as a variable"
            )
        return shortcut[0], node
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        pair = node.left, node.right
    elif isinstance(node, ast.Call) and not node.keywords and isinstance(node.func, ast.Attribute):
        if len(node.args) == 3 and node.func.attr == "addcmul" and edit.side == 0:
            return node.args[0], node
        if len(node.args) == 2 and node.func.attr == "add":
            pair = node.args[0], node.args[1]
        elif len(node.args) == 1 and node.func.attr in ("add", "add_"):
            pair = node.func.value, node.args[0]
        else:
            raise UnsupportedBlockError(f"{edit.location}: this call is not a plain addition")
    elif is_sum_of_two(node):
        pair = tuple(node.args[0].elts)  # type: ignore[attr-defined]
    else:
        raise UnsupportedBlockError(
            f"{edit.location}: the addition is made inside a different function"
        )
    return pair[edit.side], pair[1 - edit.side]


def is_sum_of_two(node: ast.AST) -> bool:
    """Whether a node is `sum([a, b])`."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return False
    what = node.args[0] if len(node.args) == 1 and node.func.id == "sum" else None
    return isinstance(what, ast.List | ast.Tuple) and len(what.elts) == 2


def node_at(location: SourceLocation, *parts: ast.AST) -> ast.expr | ast.AugAssign | None:
    """The expression, or statement `x += f`, at `location` in one of `parts`; None if not there."""
    for node in (node for part in parts for node in ast.walk(part)):
        if not isinstance(node, ast.BinOp | ast.Call | ast.AugAssign):
            continue
        if position_of(node) == location.position:
            return node
    return None


def position_of(node: ast.expr | ast.stmt) -> Any:
    """Where a node is in its file, as the position of a `SourceLocation`."""
    return node.lineno, node.end_lineno, node.col_offset, node.end_col_offset


def replaced(root: ast.AST, old: ast.AST, new: ast.AST) -> Any:
    """`root` after the node `old` in it was replaced by `new`, in place; `new` if it is `root`."""
    if old is root:
        return new
    for parent in ast.walk(root):
        for field, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, field, new)
                return root
            if isinstance(value, list) and any(part is old for part in value):
                value[:] = [new if part is old else part for part in value]
                return root
    raise ValueError(f"{ast.dump(old)} is not in {ast.dump(root)}")


def is_open(gate: str) -> ast.expr:
    return ast.Attribute(ast.Name(gate, ast.Load()), "open", ast.Load())


def negated(test: ast.expr) -> ast.expr:
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return copy.deepcopy(test.operand)
    return ast.UnaryOp(ast.Not(), copy.deepcopy(test))


def call(function: str, *arguments: ast.expr | str) -> ast.Call:
    values = [ast.Name(a, ast.Load()) if isinstance(a, str) else a for a in arguments]
    return ast.Call(ast.Name(function, ast.Load()), values, [])


def of_gate(gate: str, method: str, *arguments: ast.expr) -> ast.Call:
    """The expression `gate.method(*arguments)`."""
    function = ast.Attribute(ast.Name(gate, ast.Load()), method, ast.Load())
    return ast.Call(function, list(arguments), [])


@functools.lru_cache(maxsize=1024)
def in_loop(location: SourceLocation) -> bool:
    """Whether the expression at `location` is inside a loop of its method."""
    tree = definition(inspect.unwrap(vars(location.cls)[location.method]))
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For | ast.While)]
    return node_at(location, *loops) is not None


class _Mangle(ast.NodeTransformer):
    """Renames private names as Python does in the body of a class: `__f` becomes `_Block__f`."""

    def __init__(self, qualname: str) -> None:
        scopes = qualname.split(".")[:-1]
        self.cls = scopes[-1].lstrip("_") if scopes and scopes[-1] != "<locals>" else ""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for field in ("id", "attr", "arg", "name"):
            name = getattr(node, field, None)
            if self.cls and isinstance(name, str) and name[:2] == "__" and name[-2:] != "__":
                setattr(node, field, f"_{self.cls}{name}")
        return super().generic_visit(node)


def definition(function: FunctionType) -> ast.FunctionDef:
    """The syntax tree of `function`, with positions counted in its file.

    Raises:
        UnsupportedBlockError: when the source is missing, or is not that of a plain method.
    """
    try:
        tree = _parsed(function)
    except _NO_SOURCE as error:
        raise UnsupportedBlockError(f"{function.__qualname__} has no source to edit") from error
    if not isinstance(tree, ast.FunctionDef) or not [*tree.args.posonlyargs, *tree.args.args]:
        raise UnsupportedBlockError(f"{function.__qualname__} is not a plain method")
    _Mangle(function.__qualname__).visit(tree)
    return tree


def _parsed(function: FunctionType | CodeType) -> ast.stmt:
    lines, first = inspect.getsourcelines(function)
    within = lines[0][:1].isspace()
    tree = ast.parse("".join(["if 1:\n", *lines] if within else lines)).body[0]
    ast.increment_lineno(tree, first - 1 - within)
    return tree.body[0] if isinstance(tree, ast.If) else tree


@functools.lru_cache(maxsize=1024)
def has_one_path(code: CodeType) -> bool:
    """Whether a function has no conditions and no loops, so that it does the same in every call."""
    try:
        tree = _parsed(code)
    except _NO_SOURCE:
        return False
    return isinstance(tree, ast.FunctionDef) and not any(
        isinstance(node, _BRANCHING) for node in ast.walk(tree)
    )


def module_of(method: ast.FunctionDef) -> str:
    """The name of the first parameter of a method."""
    return [*method.args.posonlyargs, *method.args.args][0].arg


def compiled(
    function: FunctionType, tree: ast.FunctionDef, names: dict[str, Callable[..., Any]]
) -> FunctionType:
    """Compile `tree` to a function with the globals, defaults and closure of `function`.

    The cells of the closure are shared, so that both functions see each change of its variables.

    Args:
        names: further names that the code uses, each with its value.
    """
    free = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells = {**{name: CellType(value) for name, value in names.items()}, **free}
    tree.decorator_list, tree.returns = [], None
    arguments = tree.args
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [value and ast.Constant(None) for value in arguments.kw_defaults]
    module = ast.parse(f"def _factory({', '.join(cells)}): return {tree.name}")
    assert isinstance(module.body[0], ast.FunctionDef)
    module.body[0].body.insert(0, tree)
    ast.fix_missing_locations(module)
    made: dict[str, Any] = {}
    exec(compile(module, function.__code__.co_filename, "exec"), function.__globals__, made)
    code = made["_factory"](**dict.fromkeys(cells)).__code__
    closure = tuple(cells[name] for name in code.co_freevars)
    result = FunctionType(code, function.__globals__, function.__name__, None, closure)
    result.__defaults__, result.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    result.__qualname__, result.__doc__ = function.__qualname__, function.__doc__
    return result
