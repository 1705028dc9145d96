"""stochastic-depth inspect: find what can be skipped in a model, prove it, and time it."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from stochastic_depth.choices import Granularity
from stochastic_depth.cli.arguments import Flag, parse
from stochastic_depth.cli.outputs import require_output
from stochastic_depth.errors import (
    ApplyError,
    ConfigError,
    ExampleError,
    StochasticDepthError,
    first_line,
    place_of,
)
from stochastic_depth.extras import require_report
from stochastic_depth.train.checks import at_least, check_probability

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from stochastic_depth.cli.console import PlainConsole
    from stochastic_depth.surgery import Plan
    from stochastic_depth.surgery.example import Example


@dataclass(frozen=True)
class Inspect:
    """Which blocks of a model can be skipped, proved, and how much time that saves."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """timm/NAME, torchvision/NAME, transformers/TYPE (or a config.json), or package.module:factory,
    which returns a model, or a model and an example of its input. A factory is first looked for in
    the current folder. Models are built without trained weights."""
    survival: Literal["linear", "uniform"] = "linear"
    """Linear decay to --final, or --final for every block."""
    final: float = 0.5
    """The survival probability of the last block."""
    batch: int = 2
    """Samples in the example."""
    shape: Annotated[tuple[int, ...] | None, tyro.conf.arg(metavar="N ...")] = None
    """The shape of one sample; the published one when not given."""
    granularity: Granularity = "block"
    """One coin for all residual additions of a block, or one for each."""
    exclude: tuple[str, ...] = ()
    """Modules to leave as they are, by name."""
    repeats: int = 5
    """Rounds of timing."""
    plan_only: Flag = False
    """Build only the structure, without storage: print the blocks, and run nothing."""
    report: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write a page here, with the blocks as a picture, the cost of each, what drop rates would save
    in time and memory on this machine, and the lines to paste."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write everything that is printed as JSON here."""

    def check(self) -> None:
        at_least(1, batch=self.batch, repeats=self.repeats)
        check_probability("--final", self.final)
        if self.shape is not None and min(self.shape, default=0) < 1:
            raise ConfigError(f"--shape is {self.shape}: give the sizes of one sample, at least 1")
        if self.report is not None and self.plan_only:
            raise ConfigError("--report measures, and --plan-only runs nothing: leave one out")


def inspect(arguments: list[str]) -> int:
    asked = parse(Inspect, "inspect", arguments)
    require_output(asked.report, "page")
    require_output(asked.out, "inspection")
    from stochastic_depth.cli.console import PlainConsole

    console = PlainConsole()
    with console.starting():
        if asked.report is not None:
            require_report()
        from stochastic_depth.models.published import published
        from stochastic_depth.surgery import apply, plan
        from stochastic_depth.survival import LinearDecay, Uniform
    sys.path.insert(0, os.getcwd())  # so that a factory in the current folder is found
    device = "meta" if asked.plan_only else "cpu"
    with console.status("building"), _building(asked):
        model, example = published(asked.model, batch=asked.batch, shape=asked.shape, device=device)
    rule = LinearDecay(asked.final) if asked.survival == "linear" else Uniform(asked.final)

    def planned_with(granularity: Granularity) -> "Plan":
        with (
            console.status("finding the residual blocks"),
            _on_example(asked),
        ):
            return plan(model, example, rule, exclude=asked.exclude, granularity=granularity)

    planned = planned_with(asked.granularity)
    console.print(plan_table(asked.model, planned))
    for each in planned.rejected:
        console.print(f"not taken: {each}")
    result = {"model": asked.model, **asdict(planned)}
    if not planned.complete:
        _write(asked.out, result)
        whole = asked.granularity == "unit" and planned_with("block").complete
        raise _incomplete(planned, whole)
    if not asked.plan_only:
        with console.status("verifying every block"):
            apply(
                model, rule, example=example, exclude=asked.exclude, granularity=asked.granularity
            )
        result |= _measure(asked, model, example, console)
    _write(asked.out, result)
    return 0


def _measure(
    asked: Inspect, model: "nn.Module", example: "Example", console: "PlainConsole"
) -> dict[str, object]:
    """Verify and time a model with stochastic depth; prints the results and returns them."""
    from stochastic_depth.surgery import summary, verify

    with console.status("timing training steps"):
        verification = verify(model, example, repeats=asked.repeats)
        costs = summary(model, example)
    console.print(str(verification))
    console.print(
        f"expected depth {costs.expected_depth:.4g} of {len(costs.blocks)} blocks; "
        f"{100 * costs.expected_saving:.1f} % of FLOPs saved",
    )
    if asked.report is not None:
        from stochastic_depth.lab.inspection import write_inspection

        with console.status("measuring drop rates"):
            write_inspection(asked.report, asked.model, model, example, costs, asked.repeats)
        console.say(str(asked.report))
    return {"verification": asdict(verification), "expected_saving": costs.expected_saving}


@contextmanager
def _building(asked: Inspect) -> Iterator[None]:
    """Turn any error of a factory, or of the module that it is in, into one sentence.

    Raises:
        ApplyError: with the place in the user's code, in place of that error.
    """
    try:
        yield
    except StochasticDepthError:
        raise
    except Exception as error:
        remedy = "correct it there"
        if asked.plan_only:
            remedy += ", or leave out --plan-only, with which there are no values to compute with"
        raise ApplyError(
            f"{asked.model} cannot be built ({type(error).__name__}: {first_line(error)}), in "
            f"{place_of(error)}: {remedy}"
        ) from error


@contextmanager
def _on_example(asked: Inspect) -> Iterator[None]:
    """Turn any error that a model raises on its example into one sentence.

    Raises:
        ApplyError: with the remedy, in place of the model's own error.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, StochasticDepthError) and not isinstance(error, ExampleError):
            raise
        raised = error.__cause__ or error if isinstance(error, ExampleError) else error
        remedy = "give another --shape, or a factory that returns (model, example)"
        if asked.plan_only:
            remedy = "leave out --plan-only, with which there are no values to compute with"
        raise ApplyError(
            f"{asked.model} does not run on the example ({type(raised).__name__}: "
            f"{first_line(raised)}): {remedy}"
        ) from raised


def _incomplete(planned: "Plan", as_whole: bool) -> StochasticDepthError:
    """The error for blocks that cannot be skipped.

    Args:
        as_whole: whether all can be skipped with one coin for all additions of a block.
    """
    refused = [block for block in planned.blocks if block.refusal]
    names = list(dict.fromkeys(block.name for block in refused))
    whole = "; --granularity block skips all additions of a block together" if as_whole else ""
    few = f"; --exclude {' '.join(names)} leaves them as they are" if len(names) < 6 else ""
    return ApplyError(
        f"{len(refused)} of {len(planned.blocks)} blocks cannot be made skippable: "
        f"{refused[0].name!r} ({refused[0].kind}): {refused[0].refusal}{whole}{few}"
    )


def plan_table(name: str, planned: "Plan") -> "Table":
    """The table of a plan, which folds long names where the terminal is narrow."""
    from rich.table import Table

    from stochastic_depth.surgery.plan import PLAN_HEAD

    table = Table(title=name, title_justify="left", box=None, pad_edge=False)
    for column in PLAN_HEAD[:4]:
        table.add_column(column, overflow="fold")
    for column in PLAN_HEAD[4:]:
        table.add_column(column, justify="right", no_wrap=True)
    for row in planned.rows:
        table.add_row(*row)
    return table


def _write(out: Path | None, result: dict[str, object]) -> None:
    from stochastic_depth.files import write_output

    if out is not None:
        write_output(out, (json.dumps(result, indent=1) + "\n").encode())
