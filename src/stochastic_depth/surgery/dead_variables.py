"""Variables that are dead when an addition is made: None, or not used later."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import FrameType

from torch import Tensor

from stochastic_depth.surgery.edits import Caller, Sliced
from stochastic_depth.surgery.trace import Recording


@dataclass(frozen=True)
class Snapshot:
    """Variables when an addition is made, of all methods at work in each module that is edited."""

    total: int
    """The result of the addition."""
    variables: tuple[tuple[dict[str, int | None], ...], ...]
    """Module by module, method by method: None, or the number of a value that nobody but the branch
    has used by now."""


def take_snapshot(
    recording: Recording, total: int, frames: Sequence[Sequence[FrameType]], branch: set[int]
) -> Snapshot:
    """The variables that may turn out to be dead.

    Args:
        frames: of the methods at work, module by module.
        branch: the values of the branch.
    """

    def candidates(frame: FrameType) -> dict[str, int | None]:
        found: dict[str, int | None] = {}
        for name, value in frame.f_locals.items():
            if value is None:
                found[name] = None
            elif isinstance(value, Tensor):
                number = recording.number(value)
                if branch.issuperset(recording.values[number].children):
                    found[name] = number
        return found

    return Snapshot(total, tuple(tuple(map(candidates, methods)) for methods in frames))


def with_dead_variables(
    recording: Recording,
    edits: Sequence[tuple[str, Sliced | None]],
    snapshots: Sequence[Snapshot],
    outputs: set[int],
) -> tuple[tuple[str, Sliced | None], ...]:
    """`edits`, with the variables that were dead whenever the addition was made.

    Args:
        outputs: of the model.
    """

    def nobody_used(number: int | None, total: int) -> bool:
        if number is None:
            return True
        later = any(child > total for child in recording.values[number].children)
        return not later and number not in outputs

    def dead(module: int, method: int) -> frozenset[str]:
        names = [
            {
                name
                for name, number in s.variables[module][method].items()
                if nobody_used(number, s.total)
            }
            for s in snapshots
            if method < len(s.variables[module])
        ]
        return frozenset(set.intersection(*names)) if len(names) == len(snapshots) else frozenset()

    def completed(module: int, edit: Sliced | None) -> Sliced | None:
        if edit is None:
            return None
        callers = tuple(Caller(c.place, dead(module, n)) for n, c in enumerate(edit.callers, 1))
        return replace(edit, dead=dead(module, 0), callers=callers)

    return tuple((name, completed(n, edit)) for n, (name, edit) in enumerate(edits))
