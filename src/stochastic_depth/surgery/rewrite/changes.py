"""Find what the statements of a method change in place, and whether that is visible outside of it.

An object belongs to a method if the method has created it. Its parameters, and what it reads from
attributes, globals and closures, belong to others. The method is followed statement by statement,
with the objects that each variable may hold; where this is unknown, it may be an object of others.
"""

import ast
import builtins
import functools
import inspect
from collections import ChainMap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch

from stochastic_depth.errors import UnsupportedBlockError
from stochastic_depth.surgery.rewrite.functions import (
    CHOICES,
    CONTAINER_CHANGES,
    CONTAINERS,
    FACTS,
    QUERIES,
    VIEWS,
    WITH_EFFECTS,
    changes_in_place,
    is_false,
    is_torchs,
    method_of,
    names_of,
)
from stochastic_depth.surgery.rewrite.syntax import definition
from stochastic_depth.surgery.rewrite.variables import defines

Objects = frozenset[int]
"""Objects that a method creates, by the `id` of the code that creates them; and `_OTHERS`."""
_OTHERS = 0
"""Stands for all objects that the method has not created."""


@dataclass(frozen=True)
class _Value:
    """What an expression may return."""

    objects: Objects = frozenset()
    """The objects that it may be or share memory with."""
    reached: Objects = frozenset()
    """These, and the objects in them if they are containers."""

    def __or__(self, other: "_Value") -> "_Value":
        return _Value(self.objects | other.objects, self.reached | other.reached)

    @property
    def parts(self) -> "_Value":
        """The value of an element or attribute."""
        return _Value(self.reached, self.reached)


_OF_OTHERS = _Value(frozenset({_OTHERS}), frozenset({_OTHERS}))


@dataclass
class _State:
    """What is known at some point of the method."""

    variables: dict[str, _Value] = field(default_factory=dict)
    given_away: Objects = frozenset()
    """Objects that the method has created and stored where others find them."""

    def copied(self) -> "_State":
        return _State(dict(self.variables), self.given_away)

    def __or__(self, other: "_State") -> "_State":
        both = dict(self.variables)
        for name, value in other.variables.items():
            both[name] = both.get(name, value) | value
        return _State(both, self.given_away | other.given_away)


class Changes:
    """What each statement of a method changes in place.

    Args:
        tree: the method.
        function: the function that `tree` is the source of.
        cls: the class of the module.
    """

    def __init__(
        self,
        tree: ast.FunctionDef,
        function: FunctionType,
        cls: type,
        within: frozenset[str] = frozenset(),
    ) -> None:
        self._module, self._cls, self._within = tree.args.args[0].arg, cls, within | {tree.name}
        self._names: Mapping[str, Any] = ChainMap(function.__globals__, dict(vars(builtins)))
        self._nodes = list(ast.walk(tree))  # kept, so that no other node gets the `id` of one
        self._not_local = frozenset(
            name
            for node in ast.walk(tree)
            if isinstance(node, ast.Global | ast.Nonlocal)
            for name in node.names
        )
        self._variables: dict[int, frozenset[str]] = {}
        self._visible = set[int]()
        self._unknown = set[int]()
        self._containers = set[int]()
        self._changed = set[int]()
        self._state = _State()
        self._returned = _Value()
        arguments = tree.args
        for argument in ast.walk(arguments):
            if isinstance(argument, ast.arg):
                self._state.variables[argument.arg] = _OF_OTHERS
        for argument in (arguments.vararg, arguments.kwarg):
            if argument is not None:
                self._state.variables[argument.arg] = self._container(argument, _OF_OTHERS)
        self._run(tree.body)

    def variables(self, node: ast.AST) -> frozenset[str]:
        """The variables that a statement sets, or whose objects it may change."""
        changed = (self._variables.get(id(part), frozenset()) for part in ast.walk(node))
        return defines(node).union(*changed)

    def visible(self, node: ast.AST) -> bool:
        """Whether a statement may itself change an object that others see.

        The modules and functions that it calls may do so, too; see `calls_unknown`.
        """
        return any(id(part) in self._visible for part in ast.walk(node))

    def calls_unknown(self, node: ast.AST) -> bool:
        """Whether a node calls what may have an effect besides its result."""
        return any(id(part) in self._unknown for part in ast.walk(node))

    def changes_result(self, node: ast.AST) -> bool:
        """Whether the method may change in place what the expression `node` has created."""
        return id(node) in self._changed

    @property
    def returns_new(self) -> bool:
        """Whether the method returns only what it has created itself."""
        return _OTHERS not in self._returned.reached

    def _run(self, statements: Iterable[ast.stmt]) -> None:
        for statement in statements:
            self._statement(statement)

    def _statement(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Assign():
                for target in statement.targets:
                    self._assign(statement, target, statement.value)
            case ast.AnnAssign(value=ast.expr() as value):
                self._assign(statement, statement.target, value)
            case ast.AugAssign():
                self._augmented(statement)
            case ast.Expr(value=ast.Call() as called):
                result = self._value(called)
                if id(called) in self._unknown:  # it is called for its effect
                    self._visible.add(id(statement))
                    self._give_away(result.reached | self._reached_by(called))
            case ast.If():
                self._value(statement.test)
                self._either([statement.body, statement.orelse])
            case ast.For() | ast.While():
                self._loop(statement)
            case ast.With():
                for item in statement.items:
                    entered = self._value(item.context_expr)
                    if item.optional_vars is not None:
                        self._bind(statement, item.optional_vars, entered | _OF_OTHERS)
                self._run(statement.body)
            case ast.Return(value=ast.expr() as value):
                self._returned |= self._value(value)
            case _:
                self._other(statement)

    def _other(self, statement: ast.stmt) -> None:
        """A statement of a rarer kind: all that it binds may be an object of others."""
        for name in defines(statement):
            self._state.variables[name] = _OF_OTHERS
        self._any(ast.iter_child_nodes(statement))

    def _either(self, arms: Iterable[list[ast.stmt]]) -> None:
        before, after = self._state, _State()
        for arm in arms:
            self._state = before.copied()
            self._run(arm)
            after |= self._state
        self._state = after

    def _loop(self, statement: ast.For | ast.While) -> None:
        while True:
            before = self._state.copied()
            if isinstance(statement, ast.For):
                element = self._value(statement.iter).parts
                self._bind(statement, statement.target, element)
            else:
                self._value(statement.test)
            self._run(statement.body)
            self._state |= before
            if self._state == before:
                break
        self._run(statement.orelse)

    def _assign(self, statement: ast.stmt, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple | ast.List) and isinstance(value, ast.Tuple | ast.List):
            stars = any(isinstance(part, ast.Starred) for part in [*target.elts, *value.elts])
            if len(target.elts) == len(value.elts) and not stars:
                values = [self._value(part) for part in value.elts]
                for part, held in zip(target.elts, values, strict=True):
                    self._bind(statement, part, held)
                return
        self._bind(statement, target, self._value(value))

    def _bind(self, statement: ast.AST, target: ast.expr, value: _Value) -> None:
        match target:
            case ast.Name():
                if target.id in self._not_local:
                    self._visible.add(id(statement))
                    self._give_away(value.reached)
                self._state.variables[target.id] = value
            case ast.Tuple() | ast.List():
                for part in target.elts:
                    self._bind(statement, part, value.parts)
            case ast.Starred():
                self._bind(statement, target.value, value)
            case ast.Attribute() | ast.Subscript():
                held = self._value(target.value).objects
                self._change(statement, held)
                self._put(held, value.reached)

    def _augmented(self, statement: ast.AugAssign) -> None:
        value, target = self._value(statement.value), statement.target
        if isinstance(target, ast.Name):
            before = self._state.variables.get(target.id, _OF_OTHERS)
            if before.objects:  # no number or text
                self._change(statement, before.objects)
            if not before.objects.isdisjoint(self._containers):
                self._put(before.objects, value.reached)
            after = self._state.variables.get(target.id, before) | self._new(statement)
            self._bind(statement, target, after)
        else:
            self._bind(statement, target, value)

    def _value(self, node: ast.expr | None) -> _Value:
        match node:
            case None | ast.Constant() | ast.Lambda():
                return _Value()
            case ast.Name():
                return self._state.variables.get(node.id, _OF_OTHERS)
            case ast.Attribute():
                value = self._value(node.value)
                return _Value() if node.attr in FACTS else value.parts
            case ast.Subscript():
                self._value(node.slice)
                return self._value(node.value).parts
            case ast.Starred():
                return self._value(node.value).parts
            case ast.IfExp():
                self._value(node.test)
                return self._value(node.body) | self._value(node.orelse)
            case ast.BoolOp():
                return self._any(node.values)
            case ast.NamedExpr():
                value = self._value(node.value)
                self._bind(node, node.target, value)
                return value
            case ast.Tuple() | ast.List() | ast.Set():
                return self._container(node, self._any(node.elts))
            case ast.Dict():
                return self._container(node, self._any(node.values))
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
                return self._comprehension(node)
            case ast.Call():
                return self._call(node)
            case ast.BinOp(op=ast.Add()):
                both = self._value(node.left) | self._value(node.right)
                if both.objects.isdisjoint(self._containers):
                    return self._new(node)
                return self._container(node, both)
            case _:
                self._any(child for child in ast.iter_child_nodes(node))
                return self._new(node)

    def _any(self, nodes: Iterable[ast.AST]) -> _Value:
        found = _Value()
        for node in nodes:
            if isinstance(node, ast.expr):
                found |= self._value(node)
        return found

    def _comprehension(
        self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp
    ) -> _Value:
        before = self._state.copied()
        for loop in node.generators:
            self._bind(node, loop.target, self._value(loop.iter).parts)
            self._any(loop.ifs)
        elements = [node.value] if isinstance(node, ast.DictComp) else [node.elt]
        made = self._container(node, self._any(elements))
        inside = frozenset(
            name.id
            for loop in node.generators
            for name in ast.walk(loop.target)
            if isinstance(name, ast.Name)
        )
        for name in inside:
            self._state.variables.pop(name, None)
        self._state.variables.update({n: v for n, v in before.variables.items() if n in inside})
        return made

    def _call(self, node: ast.Call) -> _Value:
        function = node.func
        given = [self._value(a) for a in node.args]
        named = {keyword.arg: self._value(keyword.value) for keyword in node.keywords}
        all_given = _Value()
        for value in [*given, *named.values()]:
            all_given |= value
        first = given[0] if given else all_given
        if "out" in named:
            self._change(node, named["out"].objects)
            return named["out"]
        known, resolved = self._resolved(function)
        if isinstance(function, ast.Attribute) and not known:
            return self._method_call(node, function, first, all_given)
        if not known:  # a variable, or an expression: most likely a module
            self._unknown.add(id(node))
            return self._new(node) if node.args or node.keywords else self._value(function).parts
        name = function.attr if isinstance(function, ast.Attribute) else ast.unparse(function)
        in_place = any(
            keyword.arg == "inplace" and not is_false(keyword.value) for keyword in node.keywords
        )
        if changes_in_place(name) or in_place:
            self._change(node, first.reached)
            return first
        is_builtin = getattr(builtins, name, None) is resolved and resolved is not None
        if not is_builtin and not is_torchs(resolved):
            self._unknown.add(id(node))
            return all_given.parts | self._new(node)
        if is_builtin and name in WITH_EFFECTS:
            self._unknown.add(id(node))
        if is_builtin and name in CONTAINERS:
            return self._container(node, all_given)
        is_part = name in (CHOICES if is_builtin else VIEWS)
        return all_given.parts if is_part else self._new(node)

    def _method_call(
        self, node: ast.Call, function: ast.Attribute, first: _Value, given: _Value
    ) -> _Value:
        """A call of a method of a value, or of a module in an attribute."""
        receiver, name = self._value(function.value), function.attr
        if isinstance(function.value, ast.Name) and function.value.id == self._module:
            self._unknown.add(id(node))
            if isinstance(method := method_of(self._cls, name), FunctionType):
                creates = _returns_new(method, self._cls, self._within)
                return self._new(node) if creates else given.parts | _OF_OTHERS
            return self._new(node) if node.args or node.keywords else _OF_OTHERS
        if changes_in_place(name):
            self._change(node, receiver.objects)
            return receiver
        if name in CONTAINER_CHANGES:
            self._change(node, receiver.objects)
            self._put(receiver.objects, given.reached)
            return receiver.parts | given.parts
        if name in VIEWS:
            if self._is_visible(receiver.objects) and not hasattr(torch.Tensor, name):
                self._unknown.add(id(node))
            return receiver.parts
        of_tensor = hasattr(torch.Tensor, name)
        if name not in QUERIES and (not of_tensor or self._is_visible(receiver.objects)):
            self._unknown.add(id(node))
        if of_tensor or node.args or node.keywords:
            return self._new(node)
        return receiver.parts

    def _resolved(self, function: ast.expr) -> tuple[bool, Any]:
        """Whether a function is reached by a global name; and the function, None if unknown."""
        path = list(names_of(function))
        if not path or path[0] in self._state.variables:
            return False, None
        found = self._names.get(path[0])
        for name in path[1:]:
            found = getattr(found, name, None)
        return True, found

    def _container(self, node: ast.AST, elements: _Value) -> _Value:
        self._containers.add(id(node))
        return _Value(frozenset({id(node)}), elements.reached | {id(node)})

    @staticmethod
    def _new(node: ast.AST) -> _Value:
        return _Value(frozenset({id(node)}), frozenset({id(node)}))

    def _change(self, node: ast.AST, objects: Objects) -> None:
        """Record that `node` changes `objects` in place."""
        self._changed |= objects
        if self._is_visible(objects):
            self._visible.add(id(node))
        local = objects - {_OTHERS}
        names = {
            name
            for name, value in self._state.variables.items()
            if not local.isdisjoint(value.reached)
        }
        self._variables[id(node)] = self._variables.get(id(node), frozenset()) | names

    def _put(self, containers: Objects, objects: Objects) -> None:
        """Record that `objects` are stored in one of `containers`."""
        if self._is_visible(containers):
            self._give_away(objects)
        for name, value in self._state.variables.items():
            if not (containers - {_OTHERS}).isdisjoint(value.reached):
                self._state.variables[name] = _Value(value.objects, value.reached | objects)

    def _give_away(self, objects: Objects) -> None:
        self._state.given_away |= objects

    def _is_visible(self, objects: Objects) -> bool:
        return _OTHERS in objects or not objects.isdisjoint(self._state.given_away)

    def _reached_by(self, call: ast.Call) -> Objects:
        values = [*call.args, *(keyword.value for keyword in call.keywords)]
        names = {n.id for value in values for n in ast.walk(value) if isinstance(n, ast.Name)}
        held = (self._state.variables.get(name, _OF_OTHERS).reached for name in names)
        return frozenset[int]().union(*held)


@functools.cache
def _returns_new(method: FunctionType, cls: type, within: frozenset[str]) -> bool:
    """Whether a method of a module returns an object that it has created.

    Args:
        cls: the class of the module.
        within: the names of the methods that are being followed.
    """
    function = inspect.unwrap(method)
    if function.__name__ in within or not isinstance(function, FunctionType):
        return False
    try:
        inside = Changes(definition(function), function, cls, within)
    except UnsupportedBlockError:
        return False
    return inside.returns_new
