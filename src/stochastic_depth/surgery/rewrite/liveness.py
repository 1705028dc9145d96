"""Find the statements of a method that only the branch needs, backwards from the addition."""

import ast
import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from stochastic_depth.surgery.rewrite.syntax import negated
from stochastic_depth.surgery.rewrite.variables import (
    changes_something,
    conditional_uses,
    defines,
    is_steady,
    only_assigns,
    own_tensors,
    surely_defines,
    uses,
)

JUMPS = (ast.Return, ast.Raise, ast.Break, ast.Continue)


@dataclass
class Needed:
    """The variables that the code after some point of a method needs under a closed gate."""

    module: str
    """The name of the variable that holds the module."""
    live: frozenset[str] = frozenset()
    """Variables that are always needed."""
    maybe: dict[str, list[ast.expr]] = field(default_factory=dict)
    """Variables that are needed only if one of their conditions holds."""
    handed_out: frozenset[str] = frozenset()
    """Variables that are returned beside the result of the method; None will do."""

    def before(
        self, statement: ast.stmt, redefined: frozenset[str], handed: Sequence[ast.Name] = ()
    ) -> None:
        """Step back over a statement that always runs.

        Args:
            redefined: the variables that certainly have a new value after it.
            handed: the variables that it returns beside the result of the method.
        """
        always, conditional = conditional_uses(statement, handed, self.module)
        self.live = always | (self.live - redefined)
        self.maybe = {name: tests for name, tests in self.maybe.items() if name not in redefined}
        self.handed_out = (self.handed_out - redefined).union(name.id for name in handed)
        for name, tests in conditional.items():
            self.only_if([name], tests)
        self.settle(statement)

    def only_if(self, names: Iterable[str], tests: list[ast.expr]) -> None:
        """Record variables that are needed if one of `tests` holds."""
        for name in names:
            if name not in self.live:
                self.maybe.setdefault(name, []).extend(tests)

    def copied(self) -> "Needed":
        maybe = {name: list(tests) for name, tests in self.maybe.items()}
        return Needed(self.module, self.live, maybe, self.handed_out)

    def everything(self, statements: Iterable[ast.AST]) -> None:
        """Treat all variables that `statements` use as needed."""
        self.live |= frozenset[str]().union(*map(uses, statements))

    def settle(self, statement: ast.stmt) -> None:
        """Treat a variable as always needed if `statement` may change one of its conditions."""
        settled = [name for name, tests in self.maybe.items() if _may_change(statement, tests)]
        self.live |= frozenset(settled)
        self.maybe = {name: tests for name, tests in self.maybe.items() if name not in settled}


@dataclass
class Backward:
    """Collects the code of a branch, statement by statement, backwards."""

    is_open: ast.expr
    """The condition that the gate is open."""
    branch: list[ast.AST]
    """The expressions of the branch, and the statements that put others under the gate."""
    module: str
    """The name of the variable that holds the module."""
    shared: list[ast.AST] = field(default_factory=list)
    """Statements that the branch always needs, and that other code needs under a condition."""
    guards: list[ast.expr] = field(default_factory=list)
    """Conditions under which the addition is reached, outermost first."""
    otherwise: frozenset[str] = frozenset()
    """The variables that the method may use if one of them does not hold."""
    wanted: frozenset[str] = field(init=False)
    """The variables that the branch uses from this point on."""

    def __post_init__(self) -> None:
        self.wanted = frozenset[str]().union(*map(uses, self.branch))

    def reached_if(self, test: ast.expr, otherwise: Iterable[ast.AST]) -> None:
        """Record that, before this point, the addition is reached only if `test` holds.

        Args:
            otherwise: what may run if it does not.
        """
        self.guards.insert(0, test)
        self.otherwise = self.otherwise.union(*map(uses, otherwise))

    def through(self, block: list[ast.stmt], index: int, needed: Needed) -> bool:
        """Step back over the statements before `index` of `block`, which is changed in place.

        Returns:
            Whether a statement that is before them may be skipped, too.
        """
        for i in range(index - 1, -1, -1):
            statement = block[i]
            if _may_change(statement, self.guards):  # before it, they cannot be evaluated yet
                needed.everything(block[: i + 1])
                return False
            needed.settle(statement)
            assigns = only_assigns(statement, own_tensors(block, i, self.module))
            wanted = self.wanted_before(statement) if assigns else None
            jumps = any(isinstance(part, JUMPS) for part in ast.walk(statement))
            others = needed.live | (needed.handed_out - surely_defines(statement))
            if wanted is not None and others.isdisjoint(defines(statement)):
                block[i] = self.skipped(statement, needed)
                self.wanted = wanted
            elif (
                isinstance(statement, ast.If)
                and is_steady(statement.test, self.module)
                and not jumps
            ):
                self.through_both(statement, needed)
            else:
                needed.before(statement, surely_defines(statement))
                self.wanted -= surely_defines(statement)
        return True

    def wanted_before(self, statement: ast.stmt) -> frozenset[str] | None:
        """The variables that the branch uses from `statement` on, if all of it is for the branch.

        What a statement calls may have an effect besides its result. So each part of it must set a
        variable that the branch uses; otherwise the result is None.
        """
        used = self.wanted & defines(statement)
        return _wanted_before(statement, self.wanted) if used else None

    def skipped(self, statement: ast.stmt, needed: Needed) -> ast.If:
        """Put a statement under the gate; while it is closed, what is only handed out is None."""
        defined, surely = defines(statement), surely_defines(statement)
        if not self.otherwise.isdisjoint(defined):
            self.otherwise |= uses(statement)
        beside = defined & needed.handed_out
        needed.handed_out -= beside
        conditions = [test for name in sorted(defined) for test in needed.maybe.get(name, [])]
        needed.maybe = {name: tests for name, tests in needed.maybe.items() if name not in surely}
        if conditions:
            needed.only_if(uses(statement), conditions)
        nothing: list[ast.stmt] = [assign(name, ast.Constant(None)) for name in sorted(beside)]
        runs = any_of([self.is_open, *map(negated, self.guards), *conditions])
        gated = ast.If(runs, [statement], nothing)
        (self.shared if conditions else self.branch).append(ast.copy_location(gated, statement))
        return gated

    def through_both(self, statement: ast.If, needed: Needed) -> None:
        """Step back over both arms of a condition; either may hold parts of the branch."""
        arms = []
        wanted, wanted_before = self.wanted, frozenset[str]()
        for arm in (statement.body, statement.orelse):
            inside = needed.copied()
            self.through(arm, len(arm), inside)
            wanted_before |= self.wanted
            self.wanted = wanted
            arms.append(inside)
        self.wanted = wanted_before
        needed.live = uses(statement.test) | (arms[0].live & arms[1].live)
        needed.handed_out = arms[0].handed_out | arms[1].handed_out
        one, other = (inside.maybe for inside in arms)
        unchanged = {name: tests for name, tests in one.items() if other.get(name) == tests}
        needed.maybe = dict(unchanged)
        tests = statement.test, negated(statement.test)
        for inside, test, opposite in zip(arms, tests, reversed(tests), strict=True):
            needed.only_if(inside.live - needed.live, [test])
            for name in inside.maybe.keys() - unchanged.keys():
                if conditions := _under(test, opposite, inside.maybe[name]):
                    needed.only_if([name], conditions)


def _wanted_before(statement: ast.stmt, wanted: frozenset[str]) -> frozenset[str] | None:
    """As `Backward.wanted_before`, where the branch uses `wanted` after the statement."""
    match statement:
        case ast.Pass() | ast.Break() | ast.Continue():
            return wanted
        case ast.If(body=body, orelse=orelse):
            arms = [_wanted_before_all(arm, wanted) for arm in (body, orelse)]
            return None if None in arms else uses(statement.test).union(*filter(None, arms))
        case ast.For(body=body, orelse=orelse):
            wanted |= uses(statement)
            parts = [_wanted_before(part, wanted) for part in (*body, *orelse)]
            return None if None in parts else wanted
        case _:
            used = wanted & defines(statement)
            return (wanted - surely_defines(statement)) | uses(statement) if used else None


def _wanted_before_all(
    statements: Sequence[ast.stmt], wanted: frozenset[str]
) -> frozenset[str] | None:
    for statement in reversed(statements):
        before = _wanted_before(statement, wanted)
        if before is None:
            return None
        wanted = before
    return wanted


def any_of(tests: list[ast.expr]) -> ast.expr:
    return _joined(ast.Or(), tests)


def all_of(tests: list[ast.expr]) -> ast.expr:
    return _joined(ast.And(), tests)


def assign(name: str, value: ast.expr) -> ast.Assign:
    return ast.Assign([ast.Name(name, ast.Store())], value)


def _may_change(statement: ast.stmt, tests: Iterable[ast.expr]) -> bool:
    """Whether a statement may change one of these conditions."""
    changes, defined = changes_something(statement), defines(statement)
    return any(changes or not defined.isdisjoint(uses(test)) for test in tests)


def _under(test: ast.expr, opposite: ast.expr, conditions: Sequence[ast.expr]) -> list[ast.expr]:
    """That `test` and one of `conditions` hold: no test if they exclude each other, else one.

    Args:
        opposite: the negation of `test`.
    """
    excluded = ast.dump(opposite)
    possible = [condition for condition in conditions if ast.dump(condition) != excluded]
    if not possible or ast.dump(test) in map(ast.dump, possible):
        return [test] if possible else []
    return [all_of([test, any_of(possible)])]


def _joined(by: ast.boolop, tests: list[ast.expr]) -> ast.expr:
    different = {ast.dump(test): test for test in tests}.values()
    copies = [copy.deepcopy(test) for test in different]
    return copies[0] if len(copies) == 1 else ast.BoolOp(by, copies)
