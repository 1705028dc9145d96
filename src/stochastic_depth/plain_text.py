"""Tables, numbers, commands and foreign text in plain text."""

import shlex
from collections.abc import Iterable, Sequence


def plain_table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """A table under the heading `head`; the first `left` columns are aligned left."""
    lines = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if n < left else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def si(count: float) -> str:
    """A count with three digits and a unit prefix, such as "1.23 G"."""
    for unit in ("", "k", "M", "G", "T"):
        if float(f"{count:.3g}") < 1000:
            return f"{count:.3g} {unit}".rstrip()
        count /= 1000
    return f"{count:.3g} P"


def count_text(count: int, what: str) -> str:
    """The number and its noun: "1 figure", "2,000 figures"."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def epoch_text(epoch: float) -> str:
    """An epoch with at most two decimals: "12", "3.99"."""
    return f"{epoch:.2f}".rstrip("0").rstrip(".")


def command(*arguments: object) -> str:
    """The command that calls this program with `arguments`, as a shell takes it."""
    return shlex.join(["stochastic-depth", *map(str, arguments)])


def escaped(text: str) -> str:
    """`text`, with escapes in place of what could control a terminal or cannot be encoded."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )
