"""Time alternatives fairly on a noisy machine: in turns, in one process, after a warm-up."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """One number for each round: the seconds of an alternative, or what is computed from them."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third quartile, of at least two rounds."""
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high


def take_turns(
    alternatives: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[dict[str, float]]:
    """Call every alternative once in each of `repeats` rounds; yields the seconds of each round.

    The order is reversed in every round, so that none always comes after the same other.
    """
    order = list(alternatives)
    for number in range(-warmup, repeats):
        order.reverse()
        seconds = {}
        for name in order:
            began = clock()
            alternatives[name]()
            seconds[name] = clock() - began
        if number >= 0:
            yield seconds


def paired_ratio(rounds: list[dict[str, float]], a: str, b: str) -> Timing:
    """The seconds of `a` over those of `b`, round by round."""
    return Timing(tuple(seconds[a] / seconds[b] for seconds in rounds))
