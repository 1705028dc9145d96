"""stochastic-depth analyze: one file for each question."""

from typing import Annotated

import tyro

from stochastic_depth.cli.analyze.active import Active
from stochastic_depth.cli.analyze.depth import Depth
from stochastic_depth.cli.analyze.ensemble import Ensemble
from stochastic_depth.cli.analyze.gradients import GradientStrength
from stochastic_depth.cli.analyze.options import Analysis
from stochastic_depth.cli.console import PlainConsole

Command = (
    Annotated[GradientStrength, tyro.conf.subcommand("gradients", prefix_name=False)]
    | Annotated[Active, tyro.conf.subcommand("active", prefix_name=False)]
    | Annotated[Ensemble, tyro.conf.subcommand("ensemble", prefix_name=False)]
    | Annotated[Depth, tyro.conf.subcommand("depth", prefix_name=False)]
)


def main(arguments: list[str]) -> int:
    asked = tyro.cli(
        Command,  # pyright: ignore[reportArgumentType]
        prog="stochastic-depth analyze",
        description="Look into runs: their gradients, their ensemble, and what they can spare.",
        args=arguments,
    )
    assert isinstance(asked, Analysis)
    asked.analyse(PlainConsole())
    return 0
