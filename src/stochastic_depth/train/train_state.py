"""The state of a training run: everything that changes while it trains."""

from functools import cached_property
from math import fsum
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from stochastic_depth.data import Batches, Shard
from stochastic_depth.distributed import gates_by_rank
from stochastic_depth.distributed.world import (
    all_reduce_sum,
    broadcast_from_primary,
    rank,
    world_size,
)
from stochastic_depth.residual import Residual
from stochastic_depth.train.build import (
    build_network,
    build_optimizer,
    images_in,
    learning_rate,
)
from stochastic_depth.train.checkpoint import as_checkpoint_error
from stochastic_depth.train.config import Config
from stochastic_depth.train.engines import Engine, build_engine
from stochastic_depth.train.runtime import Runtime
from stochastic_depth.train.step import IntervalMetrics, StepMetrics


class TrainState:
    """A network in training: weights, optimizer, gates, step, and the metrics of the interval.

    Everything random in it is a function of (seed, step), so nothing else needs to be saved.
    """

    def __init__(self, config: Config, runtime: Runtime, batches: Batches) -> None:
        self.config, self.runtime = config, runtime
        self._batches = batches
        self.steps_per_epoch = batches.steps_per_epoch
        self.total_steps = config.epochs * batches.steps_per_epoch
        self.model, self.handle = build_network(config, runtime, batches)
        self.model.train()
        self.blocks = sum(isinstance(module, Residual) for module in self.model.modules())
        if world_size() > 1 and self.handle is not None:
            self.handle.balanced_parts = world_size()
            if config.distributed.rank_gates:
                gates_by_rank(self.model)
        self.optimizer = build_optimizer(config.optimizer, self.model)
        self.step = 0
        self.metrics = IntervalMetrics()
        self.elsewhere: dict[str, str] | None = None
        """What `Record.elsewhere` will be at the end of the interval."""
        self.interval = config.evaluate_every or batches.steps_per_epoch
        self._sampled_every = max(1, min(10, self.interval // 5))

    @cached_property
    def _engine(self) -> Engine:
        """Built at the first step: it may allocate buffers, capture graphs or compile blocks."""
        shape = (self.config.optimizer.batch, *self._batches.shape)
        return build_engine(self.model, self.handle, self.optimizer, self.runtime, shape)

    @property
    def epoch(self) -> float:
        return self.step / self.steps_per_epoch

    @property
    def interval_start(self) -> int:
        """The step with which the current interval began."""
        return self.step - len(self.metrics.images)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return learning_rate(
            self.config.optimizer, self.step, self.total_steps, self.steps_per_epoch
        )

    @property
    def gates(self) -> Tensor:
        """The gates of the last step: bool [L], or [L, batch]."""
        return self.handle.gates if self.handle else torch.ones(self.blocks, dtype=torch.bool)

    def gates_at(self, step: int) -> Tensor:
        """The gates of any step, for the images of all processes, as a function of (seed, step)."""
        if self.handle is None:
            return torch.ones(self.blocks, dtype=torch.bool)
        return self.handle.gates_at(step, self.images_of(step))

    def active_counts(self) -> Tensor:
        """How many steps of the current interval had n active blocks, n = 0..L: int64 [L + 1].

        Where each sample has its own gates, samples are counted. Where each process has its own
        gates, the steps of all processes are counted.
        """
        counts = torch.zeros(self.blocks + 1, dtype=torch.int64)
        for step in range(self.interval_start, self.step):
            counts += self.gates_at(step).sum(0).reshape(-1).bincount(minlength=self.blocks + 1)
        return all_reduce_sum(counts) if self.config.distributed.rank_gates else counts

    def expected_active_blocks(self) -> float:
        """The expectation of the mean of `active_counts` in the current interval."""
        if self.handle is None:
            return float(self.blocks)
        steps = range(self.interval_start, self.step)
        images = [self.images_of(step) for step in steps]
        expected = [
            fsum(self.handle.shares_at(step, batch))
            for step, batch in zip(steps, images, strict=True)
        ]
        return fmean(expected, None if self.handle.gate == "batch" else images)

    def images_of(self, step: int) -> int:
        """The number of images in the mini-batch of a step, over all processes."""
        return images_in(step, self.config, self._batches)

    def advance(self, images: Tensor, labels: Tensor) -> StepMetrics:
        """Take one training step, and add its measurements to the interval.

        Args:
            images, labels: this process's shard of the mini-batch.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        batch = self.images_of(self.step)
        if self.handle is not None and world_size() > 1:
            self.handle.rank_samples = Shard(rank(), world_size()).slice_of(batch).start, batch
        measured = self._engine.step(images, labels, len(labels) * world_size() / batch)
        self.metrics.add(measured, batch)
        if self.step % self._sampled_every == 0:
            self.metrics.add_block_gradients(self._engine.block_gradients, self.gates)
        self.step += 1
        return measured

    def synchronise_statistics(self) -> None:
        """Copy the BatchNorm statistics of the first process to all others."""
        broadcast_from_primary(self.model.buffers())

    def weights_are_finite(self) -> bool:
        return all(bool(p.isfinite().all()) for p in self.model.state_dict().values())

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "handle": self.handle.state_dict() if self.handle else None,
            "metrics": self.metrics.state_dict(),
            "elsewhere": self.elsewhere,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` has returned, together with `state["step"]`.

        Raises:
            CheckpointError: when it belongs to a different network or optimizer.
        """
        with as_checkpoint_error(state["step"]):
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.handle is not None:
                self.handle.load_state_dict(state["handle"])
            self.metrics.load_state_dict(state["metrics"], self.runtime.device)
        self.step, self.elsewhere = state["step"], state.get("elsewhere")
        self.__dict__.pop("_engine", None)  # it holds the momentum of before
