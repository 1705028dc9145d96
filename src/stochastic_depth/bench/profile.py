"""Where the time of a training step goes: by operator of autograd, by piece of a block program."""

import os
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from stochastic_depth.bench.workload import Step, Workload
from stochastic_depth.engine import Program
from stochastic_depth.engine.pieces import Block
from stochastic_depth.models import CifarResNet
from stochastic_depth.train.build import build_optimizer
from stochastic_depth.train.config import OptimizerConfig
from stochastic_depth.train.engines import KERNELS


def operators(step: Step, steps: int) -> dict[str, float]:
    """Seconds of `step` in each operator itself, on the GPU if there is one; the longest first."""
    step()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it notes its beginning and its end
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as recorded:
        for _ in range(steps):
            step()
    microseconds = {
        event.key: event.self_device_time_total or event.self_cpu_time_total
        for event in recorded.key_averages()
    }
    longest = sorted(microseconds, key=microseconds.__getitem__, reverse=True)
    return {name: 1e-6 * microseconds[name] / steps for name in longest}


class Timed:
    """A `Replay` that runs the work as it is, and notes how long it takes."""

    keeps = False

    def __init__(self, synchronise: Callable[[], None]) -> None:
        self._synchronise = synchronise
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        """Of each call, by piece."""

    def warm_up(self, work: Callable[[], None]) -> None:
        pass

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        name = _named(work)

        def timed() -> None:
            self._synchronise()
            began = time.perf_counter()
            work()
            self._synchronise()
            self.seconds[name].append(time.perf_counter() - began)

        return timed


def _named(work: Any) -> str:
    """A piece by its kind, channels and direction."""
    piece, direction = work.__self__, work.__name__.replace("_", " ")
    if not isinstance(piece, Block):
        return f"{type(piece).__name__.lower()}, {direction}"
    kind = "transition to" if piece.is_transition else "block of"
    return f"{kind} {piece.out.shape[1]} channels, {direction}"


def pieces(depth: int, workload: Workload) -> tuple[Timed, Step]:
    """What notes the seconds of each piece of a ResNet's block program, and a step of it."""
    execution = workload.execution
    model = CifarResNet(depth, channels=workload.channels)
    model.to(device=execution.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    images = workload.images().to(execution.device)
    labels = (torch.arange(workload.batch) % 10).to(execution.device)
    timed = Timed(execution.synchronise)
    program = Program(
        model.train(),
        None,
        build_optimizer(OptimizerConfig(), model),
        images.shape,
        torch.bfloat16 if execution.precision == "bfloat16" else torch.float32,
        KERNELS[execution.kernels](),
        timed,
    )
    return timed, lambda: program.step(images, labels)
