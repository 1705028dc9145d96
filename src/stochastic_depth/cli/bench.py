"""stochastic-depth bench: time alternatives in turns, in one process."""

import importlib
from dataclasses import replace
from typing import TYPE_CHECKING

from stochastic_depth.cli.arguments import choose, parse
from stochastic_depth.cli.outputs import require_output
from stochastic_depth.lab.options import (
    BenchOptions,
    DepthOptions,
    DistributedOptions,
    EngineOptions,
    EnginesOptions,
    GatesOptions,
    OverheadOptions,
    PeersOptions,
    ProfileOptions,
    SkipOptions,
    StepOptions,
)

if TYPE_CHECKING:
    from stochastic_depth.train.runtime import Runtime

BENCHMARKS: dict[str, type[BenchOptions]] = {
    "overhead": OverheadOptions,
    "skip": SkipOptions,
    "gates": GatesOptions,
    "peers": PeersOptions,
    "depth": DepthOptions,
    "engines": EnginesOptions,
    "distributed": DistributedOptions,
    "profile": ProfileOptions,
}
"""The options of each benchmark; the module of its name in `lab.bench` measures it."""


def bench(arguments: list[str]) -> int:
    about = "Time alternatives in turns, in one process."
    summaries = {name: str(kind.__doc__).splitlines()[0] for name, kind in BENCHMARKS.items()}
    name, rest = choose("stochastic-depth bench", about, "benchmark", summaries, arguments)
    asked = parse(BENCHMARKS[name], f"bench {name}", rest, summaries[name])
    require_output(asked.out, "benchmark")
    require_output(getattr(asked, "plot", None), "picture")
    from stochastic_depth.cli.console import PlainConsole

    console = PlainConsole()
    with console.starting():
        from stochastic_depth.lab.bench.results import write_json

        benchmark = importlib.import_module(f"stochastic_depth.lab.bench.{name}")
    runtime = _runtime(asked)
    console.print(runtime)
    result = benchmark.measure(asked, runtime, console)
    for part in benchmark.tables(result, asked, runtime):
        console.print(part)
    if asked.out is not None:
        write_json(asked.out, asked, runtime, result)
    return 0


def _runtime(asked: BenchOptions) -> "Runtime":
    """Where and how the steps of a benchmark are taken: by autograd, if it has no engine."""
    from stochastic_depth.train.config import Config, DataConfig
    from stochastic_depth.train.runtime import resolve_runtime

    # Images have the size of CIFAR's unless another size is asked for.
    config = Config(data=DataConfig(name="cifar10", size=getattr(asked, "size", None)))
    if not isinstance(asked, StepOptions):
        config = replace(config, device="cpu", precision="float32")
    else:
        config = replace(config, device=asked.device, precision=asked.precision)
    if not isinstance(asked, EngineOptions):
        because = "autograd takes the steps of this benchmark"
    elif asked.engine == "auto" and not _has_block_program(asked):
        because = "there is no block program for this network"
    else:
        return resolve_runtime(replace(config, engine=asked.engine))
    return replace(resolve_runtime(replace(config, engine="eager")), engine_because=because)


def _has_block_program(asked: EngineOptions) -> bool:
    """Whether a block program can train the network; if not, the engine auto is autograd."""
    return not isinstance(asked, PeersOptions) or asked.network == "cifar-resnet"
