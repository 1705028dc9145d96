"""Numbers with their units, and what to say of two results: the same text everywhere."""

from collections.abc import Iterable

from stochastic_depth.lab.experiments import Series, timing_differences
from stochastic_depth.lab.outcomes import Spread, standard_error
from stochastic_depth.lab.recorded import RecordedRun
from stochastic_depth.plain_text import count_text


def percent(spread: Spread) -> str:
    return f"{plus_minus(spread)} %"


def plus_minus(spread: Spread, digits: int = 2) -> str:
    """The mean, and the deviation if there is one."""
    deviation = "" if spread.deviation is None else f" ± {spread.deviation:.{digits}f}"
    return f"{spread.mean:.{digits}f}{deviation}"


def share(value: float) -> str:
    """A share from 0 to 1, in percent."""
    return f"{round(100 * value, 1) + 0.0:.1f} %"  # never -0.0


def duration(seconds: float) -> str:
    """A duration in the unit that people would use."""
    if seconds < 0.1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 99.95:  # to three digits it is less than 100
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours} h {rest:02} min"


def seeds(count: int) -> str:
    return count_text(count, "seed")


def runs_text(*counts: int) -> str:
    """How many runs the values of a table are averaged over."""
    if counts == (1,):
        return "1 run"
    return f"mean ± deviation, {' or '.join(map(str, counts))} runs"


def timing_note(runs: Iterable[RecordedRun]) -> str:
    """Why the seconds of runs cannot be compared; empty if they can."""
    apart = " and ".join(timing_differences(runs))
    if not apart:
        return ""
    return (
        f"The runs, or parts of them, differ in their {apart}: the seconds are not to be compared."
    )


def difference(a: Spread, b: Spread, of_a: Series, of_b: Series) -> str:
    """The difference of two mean errors, and whether it may be due to chance."""
    points = a.mean - b.mean
    if not points:
        return "the two means are the same"
    said = f"{of_a.name} is {abs(points):.2f} points {'below' if points < 0 else 'above'}"
    error = standard_error(a, b, len(of_a.runs), len(of_b.runs))
    if error is None:
        alone = "with one seed each" if len(of_a.runs) == len(of_b.runs) else "with one seed of one"
        return f"{said}; {alone}, this may be chance"
    if abs(points) < 2 * error:
        return f"{said}, less than twice its standard error of {error:.2f}: it may be chance"
    return f"{said}, more than twice its standard error of {error:.2f}"
