"""The ways of taking a training step, side by side, with all blocks active and with fewer."""

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import replace

import torch

from stochastic_depth.bench.workload import EngineStep, Workload
from stochastic_depth.engine.kernels.library import missing
from stochastic_depth.models import CifarResNet
from stochastic_depth.survival import Survival, Uniform
from stochastic_depth.train.engine_choice import EngineName, KernelsName
from stochastic_depth.train.execution import Execution

SHARES = 1.0, 0.75, 0.5
CLOSED = 1e-12
"""The survival probability of a block that is closed in every step."""

DESIGNS: dict[str, tuple[EngineName, KernelsName]] = {
    "eager": ("eager", "reference"),
    "compiled blocks": ("compiled", "reference"),
    "graphs, PyTorch's kernels": ("graphs", "reference"),
    "graphs, compiled kernels": ("graphs", "compiled"),
    "graphs, native kernels": ("graphs", "native"),
}


def active_share(blocks: int, share: float) -> Survival:
    """`share` of the blocks always open, spread evenly over the depth, the others always closed."""
    if share == 1:
        return Uniform(1.0)
    count = [int(share * n) for n in range(blocks + 1)]
    return [1.0 if after > before else CLOSED for before, after in itertools.pairwise(count)]


def designs(execution: Execution) -> tuple[dict[str, Execution], dict[str, str]]:
    """The designs that this machine can run, and why it cannot run the others."""
    there, absent = {}, {}
    for name, (engine, kernels) in DESIGNS.items():
        reason = _obstacle(engine, kernels, execution)
        if reason is None:
            there[name] = replace(execution, engine=engine, kernels=kernels)
        else:
            absent[name] = reason
    return there, absent


def _obstacle(engine: EngineName, kernels: KernelsName, execution: Execution) -> str | None:
    on_cpu = torch.device(execution.device).type == "cpu"
    if kernels == "native":
        if not on_cpu:
            return "they are for a CPU"
        if execution.precision != "bfloat16":
            return f"they are in bfloat16, the precision is {execution.precision}"
        return missing()
    if "compiled" in (engine, kernels) and on_cpu and shutil.which("g++") is None:
        return "no g++ was found, which PyTorch's compiler needs"
    return None


def engine_steps(
    depth: int, workload: Workload, names: dict[str, Execution]
) -> Iterator[tuple[str, float, EngineStep]]:
    """Design, share of active blocks and training step, each of a network of its own."""
    for name, execution in names.items():
        for share in SHARES:
            model = CifarResNet(depth, channels=workload.channels)
            survival = active_share((depth - 2) // 2, share)
            step = replace(workload, execution=execution).engine_step(model, survival)
            yield name, share, step
