"""Find the statements of a method that only the branch needs, backwards from the addition."""

import ast
import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field


def only_assigns(statement: ast.stmt) -> bool:
    """Whether a statement does nothing but set or change variables."""
    if isinstance(statement, ast.If | ast.For | ast.While):
        return all(map(only_assigns, [*statement.body, *statement.orelse]))
    if isinstance(statement, ast.Pass | ast.Break | ast.Continue):
        return True
    if isinstance(statement, ast.Assign):
        return all(_are_names(target) for target in statement.targets)
    if isinstance(statement, ast.Expr):
        return changed_in_place(statement) is not None
    return isinstance(statement, ast.AugAssign | ast.AnnAssign) and _are_names(statement.target)


def changed_in_place(node: ast.AST) -> str | None:
    """The variable that a statement such as `x.mul_(...)` or `x.append(...)` changes, or None."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        function = node.value.func
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            changes = function.attr.endswith("_") or function.attr in ("append", "extend")
            return function.value.id if changes else None
    return None


def _are_names(target: ast.expr) -> bool:
    if isinstance(target, ast.Tuple | ast.List):
        return all(map(_are_names, target.elts))
    return isinstance(target, ast.Name)


def uses(node: ast.AST) -> frozenset[str]:
    """The variables whose values a node may need."""
    names = {n.id for n in _names(node) if isinstance(n.ctx, ast.Load)}
    changed = (n.target for n in ast.walk(node) if isinstance(n, ast.AugAssign))
    return frozenset(names | {target.id for target in changed if isinstance(target, ast.Name)})


def conditional_uses(node: ast.AST) -> tuple[frozenset[str], dict[str, list[ast.expr]]]:
    """The variables that a node always needs, and those it needs under some conditions."""
    found: dict[str, list[list[ast.expr]]] = {}

    def visit(node: ast.AST, tests: list[ast.expr]) -> None:
        if isinstance(node, ast.IfExp) and is_steady(node.test):
            visit(node.test, tests)
            for name in uses(node.body) & uses(node.orelse):
                found.setdefault(name, []).append(tests)
            visit(node.body, [*tests, node.test])
            visit(node.orelse, [*tests, ast.UnaryOp(ast.Not(), node.test)])
            return
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            found.setdefault(node.id, []).append(tests)
        for child in ast.iter_child_nodes(node):
            visit(child, tests)

    visit(node, [])
    always = (uses(node) - found.keys()) | {name for name, each in found.items() if [] in each}
    return frozenset(always), {
        name: [tests[0] if len(tests) == 1 else ast.BoolOp(ast.And(), tests) for tests in each]
        for name, each in found.items()
        if name not in always
    }


def defines(node: ast.AST) -> frozenset[str]:
    """The variables that a node may set or change."""
    loops = (n.target for n in ast.walk(node) if isinstance(n, ast.comprehension))
    of_comprehensions = {id(name) for target in loops for name in _names(target)}
    stored = (n for n in _names(node) if isinstance(n.ctx, ast.Store))
    changed = (name for n in ast.walk(node) if (name := changed_in_place(n)) is not None)
    return frozenset([*(n.id for n in stored if id(n) not in of_comprehensions), *changed])


def surely_defines(statement: ast.stmt) -> frozenset[str]:
    """The variables that certainly have a new value after a statement."""
    if isinstance(statement, ast.If):
        both = [
            frozenset[str]().union(*map(surely_defines, part))
            for part in (statement.body, statement.orelse)
        ]
        return both[0] & both[1]
    if isinstance(statement, ast.Assign):
        return frozenset[str]().union(*map(defines, statement.targets))
    if isinstance(statement, ast.AnnAssign | ast.AugAssign) and statement.value is not None:
        return defines(statement.target)
    return frozenset()


def stores_elsewhere(statement: ast.stmt) -> bool:
    """Whether a statement changes something besides variables."""
    return any(
        isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store)
        for node in ast.walk(statement)
    )


def _names(node: ast.AST) -> Iterator[ast.Name]:
    return (n for n in ast.walk(node) if isinstance(n, ast.Name))


def is_steady(test: ast.expr) -> bool:
    """Whether a condition may be evaluated at an earlier point, because it calls nothing."""
    kinds = (ast.Name, ast.Attribute, ast.Constant, ast.Compare, ast.BoolOp, ast.UnaryOp)
    others = (ast.expr_context, ast.cmpop, ast.boolop, ast.unaryop)
    return all(isinstance(node, kinds + others) for node in ast.walk(test))


@dataclass
class Needed:
    """The variables that the code after some point of a method needs under a closed gate."""

    live: frozenset[str] = frozenset()
    """Variables that are always needed."""
    maybe: dict[str, list[ast.expr]] = field(default_factory=dict)
    """Variables that are needed only if one of their conditions holds."""

    def before(self, statement: ast.stmt, redefined: frozenset[str]) -> None:
        """Step back over a statement that always runs.

        Args:
            redefined: the variables that certainly have a new value after it.
        """
        always, conditional = conditional_uses(statement)
        self.live = always | (self.live - redefined)
        self.maybe = {name: tests for name, tests in self.maybe.items() if name not in redefined}
        for name, tests in conditional.items():
            self.only_if([name], tests)

    def only_if(self, names: Iterable[str], tests: list[ast.expr]) -> None:
        """Record variables that are needed if one of `tests` holds."""
        for name in names:
            if name not in self.live:
                self.maybe.setdefault(name, []).extend(tests)

    def copied(self) -> "Needed":
        maybe = {name: list(tests) for name, tests in self.maybe.items()}
        return Needed(self.live, maybe)

    def settle(self, changes: Callable[[ast.expr], bool]) -> None:
        """Treat a variable as always needed if a statement `changes` one of its conditions."""
        settled = [name for name, tests in self.maybe.items() if any(map(changes, tests))]
        self.live |= frozenset(settled)
        self.maybe = {name: tests for name, tests in self.maybe.items() if name not in settled}


@dataclass
class Backward:
    """Collects the code of a branch, statement by statement, backwards."""

    runs: ast.expr
    """The condition under which it runs."""
    dead: frozenset[str]
    """Variables that a closed branch may set to None."""
    branch: list[ast.AST]
    """The expressions and statements of the branch found so far."""
    shared: list[ast.AST] = field(default_factory=list)
    """Statements that the branch always needs, and that other code needs under a condition."""
    guards: list[ast.expr] = field(default_factory=list)
    """Conditions under which the addition is reached."""

    def reached_if(self, test: ast.expr) -> None:
        """Record that, before this point, the addition is reached only if `test` holds."""
        self.guards.append(test)
        self.runs = any_of([self.runs, negated(test)])

    def through(self, block: list[ast.stmt], index: int, needed: Needed) -> None:
        """Step back over the statements before `index` of `block`, which is changed in place."""
        for i in range(index - 1, -1, -1):
            statement = block[i]
            defined = defines(statement)
            changes = functools.partial(_changes, statement)
            if any(map(changes, self.guards)):  # before it, the guards cannot be evaluated yet
                needed.live = needed.live.union(*map(uses, block[: i + 1]))
                return
            needed.settle(changes)
            beside = defined & needed.live & self.dead
            if (
                only_assigns(statement)
                and defined & needed.live == beside
                and (not beside or defined & self.wanted())
            ):
                block[i] = self.skipped(statement, beside, needed)
            elif (
                isinstance(statement, ast.If)
                and is_steady(statement.test)
                and only_assigns(statement)
            ):
                self.through_both(statement, needed)
            else:
                needed.before(statement, surely_defines(statement))
            self.dead -= defined  # before this statement, they had other values

    def skipped(self, statement: ast.stmt, beside: frozenset[str], needed: Needed) -> ast.stmt:
        """Put a statement under the gate; while it is closed, the variables `beside` are None."""
        needed.live -= beside
        conditions = [
            test for name in sorted(defines(statement)) for test in needed.maybe.pop(name, [])
        ]
        if conditions:
            needed.only_if(uses(statement), conditions)
        (self.shared if conditions else self.branch).append(statement)
        nothing: list[ast.stmt] = [assign(name, ast.Constant(None)) for name in sorted(beside)]
        return ast.If(any_of([self.runs, *conditions]), [statement], nothing)

    def through_both(self, statement: ast.If, needed: Needed) -> None:
        """Step back over both arms of a condition; either may hold parts of the branch."""
        arms = []
        for arm in (statement.body, statement.orelse):
            inside, dead = needed.copied(), self.dead
            self.through(arm, len(arm), inside)
            self.dead = dead
            arms.append(inside)
        tests = [statement.test], [negated(statement.test)]
        needed.live = uses(statement.test) | (arms[0].live & arms[1].live)
        needed.maybe = {}
        for inside, (test,) in zip(arms, tests, strict=True):
            needed.only_if(inside.live - needed.live, [test])
            for name, inner in inside.maybe.items():
                needed.only_if([name], [all_of([test, any_of(inner)])])

    def wanted(self) -> frozenset[str]:
        """The variables that the branch uses."""
        return frozenset[str]().union(*map(uses, [*self.branch, *self.shared]))


def any_of(tests: list[ast.expr]) -> ast.expr:
    return _joined(ast.Or(), tests)


def all_of(tests: list[ast.expr]) -> ast.expr:
    return _joined(ast.And(), tests)


def negated(test: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.Not(), copy.deepcopy(test))


def assign(name: str, value: ast.expr) -> ast.Assign:
    return ast.Assign([ast.Name(name, ast.Store())], value)


def _changes(statement: ast.stmt, test: ast.expr) -> bool:
    return stores_elsewhere(statement) or bool(defines(statement) & uses(test))


def _joined(by: ast.boolop, tests: list[ast.expr]) -> ast.expr:
    different = {ast.dump(test): test for test in tests}.values()
    copies = [copy.deepcopy(test) for test in different]
    return copies[0] if len(copies) == 1 else ast.BoolOp(by, copies)
