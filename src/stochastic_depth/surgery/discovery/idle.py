"""Variables that a closed branch does not compute: None, or used by the branch and nobody else.

An attention layer returns its weights, the method hands them on, and the model drops them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import FrameType

from torch import Tensor

from stochastic_depth.surgery.discovery.cuts import Caller, Sliced
from stochastic_depth.surgery.discovery.recording import Recording


@dataclass(frozen=True)
class Snapshot:
    """Variables when an addition is made, of all methods at work in each module that is cut."""

    total: int
    """The result of the addition."""
    variables: tuple[tuple[dict[str, int | None], ...], ...]
    """Module by module, method by method: None, or the number of a value that nobody but the branch
    has used by now."""


def take_snapshot(
    recording: Recording, total: int, frames: Sequence[Sequence[FrameType]], branch: set[int]
) -> Snapshot:
    """What may turn out to be idle.

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


def with_idle(
    recording: Recording,
    cuts: Sequence[tuple[str, Sliced | None]],
    snapshots: Sequence[Snapshot],
    outputs: set[int],
) -> tuple[tuple[str, Sliced | None], ...]:
    """`cuts`, with the variables that were idle whenever the addition was made.

    Args:
        outputs: of the model.
    """

    def nobody_used(number: int | None, total: int) -> bool:
        if number is None:
            return True
        later = any(child > total for child in recording.values[number].children)
        return not later and number not in outputs

    def idle(module: int, method: int) -> frozenset[str]:
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

    def completed(module: int, cut: Sliced | None) -> Sliced | None:
        if cut is None:
            return None
        callers = tuple(Caller(c.place, idle(module, n)) for n, c in enumerate(cut.callers, 1))
        return replace(cut, idle=idle(module, 0), callers=callers)

    return tuple((name, completed(n, cut)) for n, (name, cut) in enumerate(cuts))
