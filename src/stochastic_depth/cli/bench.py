"""stochastic-depth bench: time alternatives in turns, in one process."""

import importlib
from dataclasses import replace

from stochastic_depth.cli.arguments import choose, parse
from stochastic_depth.lab.options import (
    BenchOptions,
    BusyOptions,
    ClosedOptions,
    DataOptions,
    DepthOptions,
    Dinov2Options,
    DistributedOptions,
    EnginesOptions,
    OverheadOptions,
    PeersOptions,
    PicturesOptions,
    ProfileOptions,
    SkipOptions,
    SteadyOptions,
)

BENCHMARKS: dict[str, tuple[type[BenchOptions], str]] = {
    "overhead": (OverheadOptions, "skipping.overhead"),
    "skip": (SkipOptions, "skipping.skip"),
    "steady": (SteadyOptions, "steadiness.bench_steady"),
    "closed": (ClosedOptions, "closed.bench_closed"),
    "dinov2": (Dinov2Options, "dinov2.bench_dinov2"),
    "peers": (PeersOptions, "peers.bench_peers"),
    "depth": (DepthOptions, "depth.bench_depth"),
    "engines": (EnginesOptions, "engines.bench_engines"),
    "distributed": (DistributedOptions, "distributed.bench_distributed"),
    "data": (DataOptions, "data.bench_data"),
    "profile": (ProfileOptions, "engines.bench_profile"),
    "pictures": (PicturesOptions, "data.bench_pictures"),
    "busy": (BusyOptions, "steadiness.bench_busy"),
}
"""The options of each benchmark, and the function of the laboratory that measures it."""


def bench(arguments: list[str]) -> int:
    about = "Time alternatives in turns, in one process."
    summaries = {
        name: str(options.__doc__).splitlines()[0] for name, (options, _) in BENCHMARKS.items()
    }
    name, rest = choose("stochastic-depth bench", about, "benchmark", summaries, arguments)
    options, where = BENCHMARKS[name]
    asked = parse(options, f"bench {name}", rest, summaries[name])
    from stochastic_depth.cli.console import PlainConsole

    console = PlainConsole()
    with console.starting():
        from stochastic_depth.lab.bench.results import write_json
        from stochastic_depth.train.config import Config, DataConfig
        from stochastic_depth.train.runtime import resolve_runtime

        module, function = where.split(".")
        measure = getattr(importlib.import_module(f"stochastic_depth.lab.bench.{module}"), function)
    # Images have the size of CIFAR's unless another size is asked for.
    data = DataConfig(name="cifar10", size=getattr(asked, "size", None))
    runtime = resolve_runtime(
        Config(data=data, device=asked.device, precision=asked.precision, engine=asked.engine)
    )
    if asked.engine == "auto" and not asked.has_block_program:
        because = "there is no block program for this network"
        runtime = replace(runtime, engine="eager", kernels="reference", engine_because=because)
    console.print(runtime.described())
    result = measure(asked, runtime, console)
    if asked.out is not None:
        write_json(asked.out, asked, runtime, result)
    return 0
