"""How many epochs of a comparison fit into a given time: a few training steps are timed first."""

import statistics
import time
from dataclasses import dataclass

import torch

from stochastic_depth.lab.comparison import twins
from stochastic_depth.lab.expected_cost import expected_cost
from stochastic_depth.plain_text import count_text
from stochastic_depth.train import Config
from stochastic_depth.train.open import open_batches
from stochastic_depth.train.runtime import resolve_runtime
from stochastic_depth.train.train_state import TrainState

FEWEST_EPOCHS = 3
"""The fewest epochs of a comparison; with fewer nothing can be seen."""
SECONDS_AT_END = 10.0
"""How many seconds are reserved for the last checkpoint and the table."""
SLOWER_THAN_MEASURED = 2.0
"""How much longer an epoch is assumed to take than its measured steps, because of evaluations,
checkpoints and other load."""


@dataclass(frozen=True)
class Pace:
    """How long a training step of constant depth takes on this machine."""

    seconds: dict[int, float]
    """Seconds of a step, by the number of threads."""
    steps_per_epoch: int
    saving: float
    """The share of a step that stochastic depth is expected to save."""

    @property
    def threads(self) -> int:
        """The number of threads with the shortest step."""
        return min(self.seconds, key=lambda threads: self.seconds[threads])

    @property
    def epoch(self) -> float:
        """Seconds of an epoch of both networks together."""
        step = self.seconds[self.threads] * (2 - self.saving)
        return step * self.steps_per_epoch * SLOWER_THAN_MEASURED

    def epochs_in(self, seconds: float, wanted: int) -> int:
        """How many epochs of both networks fit into `seconds`, from `FEWEST_EPOCHS` to `wanted`."""
        return max(min(FEWEST_EPOCHS, wanted), min(wanted, int(seconds / self.epoch)))

    def __str__(self) -> str:
        """A sentence: the time of a step with each number of threads, and the chosen one."""
        of_each = ", ".join(
            f"{seconds:.2f} s with {count_text(threads, 'thread')}"
            for threads, seconds in sorted(self.seconds.items())
        )
        return f"a step takes {of_each}: taking {self.threads}"


def measure_pace(config: Config, patience: float = 10.0) -> Pace:
    """Take a few training steps with one thread and with all, and keep the better number.

    Args:
        patience: seconds after which no further steps are taken.
    """
    constant, _ = twins(config)
    runtime = resolve_runtime(constant)
    batches = open_batches(constant, runtime)
    train_state = TrainState(constant, runtime, batches)
    cost = expected_cost(config, batches.shape, len(batches.classes), batches.steps_per_epoch)
    mini_batch = next(iter(batches.train(0)))
    everything = torch.get_num_threads()
    choices = [1, everything] if everything > 1 and not runtime.on_gpu else [everything]
    timed: dict[int, list[float]] = {threads: [] for threads in choices}
    began = time.monotonic()
    for _ in range(4):
        for threads in choices:
            torch.set_num_threads(threads)
            start = time.perf_counter()
            train_state.advance(*mini_batch)
            runtime.synchronise()
            timed[threads].append(time.perf_counter() - start)
        best = min(min(of_n) for of_n in timed.values())
        choices = [threads for threads in choices if min(timed[threads]) < 2 * best]
        if time.monotonic() - began > patience:
            break
    # The first step of each also allocates and compiles.
    seconds = {n: statistics.median(of_n[1:] or of_n) for n, of_n in timed.items()}
    pace = Pace(seconds, batches.steps_per_epoch, cost.saving)
    torch.set_num_threads(pace.threads)
    return pace
