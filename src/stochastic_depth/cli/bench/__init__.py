"""stochastic-depth bench: one file for each benchmark."""

from typing import Annotated

import tyro

from stochastic_depth.cli.bench.data import Data
from stochastic_depth.cli.bench.depth import Depth
from stochastic_depth.cli.bench.distributed import Distributed
from stochastic_depth.cli.bench.engines import Engines
from stochastic_depth.cli.bench.options import Options
from stochastic_depth.cli.bench.output import write_json
from stochastic_depth.cli.bench.overhead import Overhead
from stochastic_depth.cli.bench.peers import Peers
from stochastic_depth.cli.bench.skip import SkipBench
from stochastic_depth.cli.console import PlainConsole
from stochastic_depth.train.config import Config
from stochastic_depth.train.execution import resolve_execution

Command = (
    Annotated[Overhead, tyro.conf.subcommand("overhead", prefix_name=False)]
    | Annotated[SkipBench, tyro.conf.subcommand("skip", prefix_name=False)]
    | Annotated[Peers, tyro.conf.subcommand("peers", prefix_name=False)]
    | Annotated[Depth, tyro.conf.subcommand("depth", prefix_name=False)]
    | Annotated[Engines, tyro.conf.subcommand("engines", prefix_name=False)]
    | Annotated[Distributed, tyro.conf.subcommand("distributed", prefix_name=False)]
    | Annotated[Data, tyro.conf.subcommand("data", prefix_name=False)]
)


def main(arguments: list[str]) -> int:
    asked = tyro.cli(
        Command,  # pyright: ignore[reportArgumentType]
        prog="stochastic-depth bench",
        description="Time alternatives in turns, in one process.",
        args=arguments,
    )
    assert isinstance(asked, Options)
    execution = resolve_execution(
        Config(device=asked.device, precision=asked.precision, engine=asked.engine)
    )
    console = PlainConsole()
    console.print(execution.described())
    result = asked.run(execution, console)
    if asked.out is not None:
        write_json(asked.out, asked, execution, result)
    return 0
