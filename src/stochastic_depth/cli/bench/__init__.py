"""stochastic-depth bench: one file for each benchmark."""

import tyro

from stochastic_depth.cli import usage_error
from stochastic_depth.cli.bench.data import Data
from stochastic_depth.cli.bench.depth import Depth
from stochastic_depth.cli.bench.distributed import Distributed
from stochastic_depth.cli.bench.engines import Engines
from stochastic_depth.cli.bench.options import Options
from stochastic_depth.cli.bench.output import write_json
from stochastic_depth.cli.bench.overhead import Overhead
from stochastic_depth.cli.bench.peers import Peers
from stochastic_depth.cli.bench.pictures import Pictures
from stochastic_depth.cli.bench.profile import Profile
from stochastic_depth.cli.bench.skip import SkipBench
from stochastic_depth.cli.bench.steady import SteadyBench
from stochastic_depth.cli.console import PlainConsole
from stochastic_depth.train.config import Config
from stochastic_depth.train.runtime import resolve_execution

BENCHMARKS: dict[str, type[Options]] = {
    "overhead": Overhead,
    "skip": SkipBench,
    "steady": SteadyBench,
    "peers": Peers,
    "depth": Depth,
    "engines": Engines,
    "distributed": Distributed,
    "data": Data,
    "profile": Profile,
    "pictures": Pictures,
}
HELP = """usage: stochastic-depth bench BENCHMARK [OPTIONS]

Time alternatives in turns, in one process.

{benchmarks}

stochastic-depth bench BENCHMARK --help tells its options and their defaults.
"""


def main(arguments: list[str]) -> int:
    name, *arguments = arguments or ["--help"]
    if name in ("-h", "--help"):
        lines = (f"  {name:11}  {_summary(of)}" for name, of in BENCHMARKS.items())
        print(HELP.format(benchmarks="\n".join(lines)), end="")
        return 0
    if name not in BENCHMARKS:
        return usage_error("benchmark", name, BENCHMARKS)
    benchmark = BENCHMARKS[name]
    asked = tyro.cli(
        benchmark,
        prog=f"stochastic-depth bench {name}",
        description=benchmark.__doc__,
        args=arguments,
    )
    execution = resolve_execution(
        Config(device=asked.device, precision=asked.precision, engine=asked.engine)
    )
    console = PlainConsole()
    console.print(execution.described())
    result = asked.run(execution, console)
    if asked.out is not None:
        write_json(asked.out, asked, execution, result)
    return 0


def _summary(benchmark: type[Options]) -> str:
    return (benchmark.__doc__ or "").splitlines()[0]
