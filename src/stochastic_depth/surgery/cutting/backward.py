"""Go back from an addition through its method, and gate what only the branch needs."""

import ast
import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from stochastic_depth.surgery.cutting.liveness import (
    conditional_uses,
    defines,
    is_steady,
    only_assigns,
    stores_elsewhere,
    surely_defines,
    uses,
)


@dataclass
class Needed:
    """The variables that are needed under a closed gate, from some point of the method on."""

    live: frozenset[str] = frozenset()
    maybe: dict[str, list[ast.expr]] = field(default_factory=dict)
    """Needed only if one of these conditions holds."""

    def before(self, statement: ast.stmt, redefined: frozenset[str]) -> None:
        """Go back over a statement that runs in any case."""
        always, conditional = conditional_uses(statement)
        self.live = always | (self.live - redefined)
        self.maybe = {name: tests for name, tests in self.maybe.items() if name not in redefined}
        for name, tests in conditional.items():
            self.only_if([name], tests)

    def only_if(self, names: Iterable[str], tests: list[ast.expr]) -> None:
        """Note variables that are needed if one of `tests` holds."""
        for name in names:
            if name not in self.live:
                self.maybe.setdefault(name, []).extend(tests)

    def copied(self) -> "Needed":
        maybe = {name: list(tests) for name, tests in self.maybe.items()}
        return Needed(self.live, maybe)

    def settle(self, changes: Callable[[ast.expr], bool]) -> None:
        """Before a statement that `changes` conditions, what they decide is needed in any case."""
        settled = [name for name, tests in self.maybe.items() if any(map(changes, tests))]
        self.live |= frozenset(settled)
        self.maybe = {name: tests for name, tests in self.maybe.items() if name not in settled}


@dataclass
class Backward:
    """What a branch needs, statement by statement backwards."""

    runs: ast.expr
    """The condition under which it runs."""
    idle: frozenset[str]
    """Variables that a closed branch makes None."""
    branch: list[ast.AST]
    """The expressions and statements of the branch found so far."""
    shared: list[ast.AST] = field(default_factory=list)
    """Statements that the branch needs always, and others under a condition."""
    guards: list[ast.expr] = field(default_factory=list)
    """Conditions under which the addition is reached."""

    def reached_if(self, test: ast.expr) -> None:
        """From here on back the addition is reached only if `test` holds."""
        self.guards.append(test)
        self.runs = any_of([self.runs, negated(test)])

    def through(self, block: list[ast.stmt], index: int, needed: Needed) -> None:
        """Go back over the statements before `index` of `block`, which is changed in place."""
        for i in range(index - 1, -1, -1):
            statement = block[i]
            defined = defines(statement)
            changes = functools.partial(_changes, statement)
            if any(map(changes, self.guards)):  # before it, whether the addition is reached is open
                needed.live = needed.live.union(*map(uses, block[: i + 1]))
                return
            needed.settle(changes)
            beside = defined & needed.live & self.idle
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
            self.idle -= defined  # which earlier statements gave another value

    def skipped(self, statement: ast.stmt, beside: frozenset[str], needed: Needed) -> ast.stmt:
        """A statement that runs with the branch only; what it defines `beside` it is else None."""
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
        """Go back over both arms of a condition, in which some of the branch may be."""
        arms = []
        for arm in (statement.body, statement.orelse):
            inside, idle = needed.copied(), self.idle
            self.through(arm, len(arm), inside)
            self.idle = idle
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
