"""Find the statements of a method that only the branch needs, backwards from the addition."""

import ast
import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from stochastic_depth.surgery.rewrite.changes import Changes
from stochastic_depth.surgery.rewrite.side_outputs import used_before, used_by_test
from stochastic_depth.surgery.rewrite.variables import (
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
    """The variables that the code after some point of a method needs under a closed gate."""

    live: frozenset[str] = frozenset()
    """Variables that are always needed."""
    maybe: dict[str, list[ast.expr]] = field(default_factory=dict)
    """Variables that are needed only if one of their conditions holds."""
    used: frozenset[str] = frozenset()
    """Variables that are needed for more than to be handed out; see `used_before`."""

    def before(self, statement: ast.stmt, redefined: frozenset[str]) -> None:
        """Step back over a statement that always runs.

        Args:
            redefined: the variables that certainly have a new value after it.
        """
        self.used = used_before(statement, self.used)
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
        return Needed(self.live, maybe, self.used)

    def everything(self, statements: Iterable[ast.stmt]) -> None:
        """Treat all variables that `statements` use as needed."""
        names = frozenset[str]().union(*map(uses, statements))
        self.live |= names
        self.used |= names

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
    """Variables that a closed branch may set to None where they are only handed out."""
    branch: list[ast.AST]
    """The expressions and statements of the branch found so far."""
    changes: Changes
    """What the statements of the method change."""
    shared: list[ast.AST] = field(default_factory=list)
    """Statements that the branch always needs, and that other code needs under a condition."""
    unused: list[ast.AST] = field(default_factory=list)
    """Statements that nothing needs, and that have no other effect."""
    guards: list[ast.expr] = field(default_factory=list)
    """Conditions under which the addition is reached."""
    wanted: frozenset[str] = field(init=False)
    """The variables that the branch uses from this point on."""

    def __post_init__(self) -> None:
        self.wanted = frozenset[str]().union(*map(uses, self.branch))

    def reached_if(self, test: ast.expr) -> None:
        """Record that, before this point, the addition is reached only if `test` holds."""
        self.guards.append(test)
        self.runs = any_of([self.runs, negated(test)])

    def through(self, block: list[ast.stmt], index: int, needed: Needed) -> None:
        """Step back over the statements before `index` of `block`, which is changed in place."""
        for i in range(index - 1, -1, -1):
            statement = block[i]
            defined = self.changes.variables(statement)
            changes = functools.partial(_changes, statement)
            if any(map(changes, self.guards)):  # before it, the guards cannot be evaluated yet
                needed.everything(block[: i + 1])
                return
            needed.settle(changes)
            beside = defined & needed.live & self.dead - needed.used
            skippable = defined & needed.live == beside and self.is_for_branch(statement)
            if skippable and (not beside or defined & self.wanted):
                block[i] = self.skipped(statement, beside, needed)
            elif (
                isinstance(statement, ast.If)
                and is_steady(statement.test)
                and only_assigns(statement)
            ):
                self.through_both(statement, needed)
            else:
                needed.before(statement, surely_defines(statement))
                self.wanted -= surely_defines(statement)
            self.dead -= defined  # before this statement, they had other values

    def is_for_branch(self, statement: ast.stmt) -> bool:
        """Whether a statement does nothing that can be noticed, except to set variables.

        What it calls may have an effect besides its result. Such calls must be for the branch: it
        uses a variable that they set.
        """
        if not only_assigns(statement) or self.changes.visible(statement):
            return False
        simple, headers = _parts(statement)
        wanted, more = self.wanted, frozenset[str]()
        if wanted & self.changes.variables(statement):
            more = frozenset[str]().union(*map(uses, headers))
        elif self.changes.calls_unknown(statement):
            return False
        while not more <= wanted:
            wanted |= more
            inside = [part for part in simple if wanted & self.changes.variables(part)]
            more = frozenset[str]().union(*map(uses, inside))
        return all(
            wanted & self.changes.variables(part) or not self.changes.calls_unknown(part)
            for part in simple
        )

    def skipped(self, statement: ast.stmt, beside: frozenset[str], needed: Needed) -> ast.stmt:
        """Put a statement under the gate; while it is closed, the variables `beside` are None."""
        defined = self.changes.variables(statement)
        needed.live -= beside
        needed.used -= surely_defines(statement)
        conditions = [test for name in sorted(defined) for test in needed.maybe.pop(name, [])]
        if conditions:
            needed.only_if(uses(statement), conditions)
            needed.used |= uses(statement)
        if defined & self.wanted:
            self.wanted = (self.wanted - surely_defines(statement)) | uses(statement)
            found = self.shared if conditions else self.branch
        else:
            found = self.shared if conditions else self.unused
        found.append(statement)
        nothing: list[ast.stmt] = [assign(name, ast.Constant(None)) for name in sorted(beside)]
        return ast.If(any_of([self.runs, *conditions]), [statement], nothing)

    def through_both(self, statement: ast.If, needed: Needed) -> None:
        """Step back over both arms of a condition; either may hold parts of the branch."""
        arms = []
        used = used_by_test(statement, needed.used)
        dead, wanted, wanted_before = self.dead, self.wanted, frozenset[str]()
        for arm in (statement.body, statement.orelse):
            inside = needed.copied()
            self.through(arm, len(arm), inside)
            wanted_before |= self.wanted
            self.dead, self.wanted = dead, wanted
            arms.append(inside)
        self.wanted = wanted_before
        needed.used = used | arms[0].used | arms[1].used
        needed.live = uses(statement.test) | (arms[0].live & arms[1].live)
        one, other = (inside.maybe for inside in arms)
        unchanged = {name: tests for name, tests in one.items() if other.get(name) == tests}
        needed.maybe = dict(unchanged)
        tests = statement.test, negated(statement.test)
        for inside, test, opposite in zip(arms, tests, reversed(tests), strict=True):
            needed.only_if(inside.live - needed.live, [test])
            for name in inside.maybe.keys() - unchanged.keys():
                if conditions := _under(test, opposite, inside.maybe[name]):
                    needed.only_if([name], conditions)


def any_of(tests: list[ast.expr]) -> ast.expr:
    return _joined(ast.Or(), tests)


def all_of(tests: list[ast.expr]) -> ast.expr:
    return _joined(ast.And(), tests)


def negated(test: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.Not(), copy.deepcopy(test))


def assign(name: str, value: ast.expr) -> ast.Assign:
    return ast.Assign([ast.Name(name, ast.Store())], value)


def _parts(statement: ast.stmt) -> tuple[list[ast.stmt], list[ast.expr]]:
    """The simple statements in a statement; and the tests and iterables of those around them."""
    if not isinstance(statement, ast.If | ast.For | ast.While):
        return [statement], []
    inside = [_parts(part) for part in [*statement.body, *statement.orelse]]
    header = statement.iter if isinstance(statement, ast.For) else statement.test
    simple = [part for parts, _ in inside for part in parts]
    return simple, [header, *(each for _, headers in inside for each in headers)]


def _changes(statement: ast.stmt, test: ast.expr) -> bool:
    return stores_elsewhere(statement) or bool(defines(statement) & uses(test))


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
