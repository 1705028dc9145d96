"""Which blocks run in a step: a pure function of (seed, step)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from stochastic_depth.errors import GateError
from stochastic_depth.randomness import digest, uniforms

GateKind = Literal["batch", "sample", "subset"]
"""One coin a block and mini-batch (the paper), or one a block and sample: masked or selected."""

Scale = Literal["inference", "training"]
"""Where p_l is made up for: times p_l in evaluation (the paper), or over p_l in training."""


class Gate(NamedTuple):
    """What one block does in one forward pass."""

    open: bool = True
    """b_l: whether the branch runs at all."""
    factor: Tensor | None = None
    """float64 [], on the CPU: what the branch is multiplied by, if by anything.

    A tensor, because a compiler takes a float for a constant and compiles again for each other one.
    """
    keep: Tensor | None = None
    """bool [batch]: the branch runs on every sample, and counts for these only."""
    samples: Tensor | None = None
    """int64 [k]: the branch runs on these samples only."""
    batch: int | None = None
    """The number of samples that `keep` or `samples` were drawn for."""

    def select(self, value: Any) -> Any:
        """Give the samples that the branch runs on: of tensors [batch, ...], [k, ...].

        Args:
            value: a tensor, or tuples, lists and mappings of anything; what is no tensor
                [batch, ...] stays as it is.
        """
        if self.samples is None:
            return value
        if isinstance(value, Tensor):
            if value.ndim == 0 or len(value) != self.batch or len(self.samples) == self.batch:
                return value
            return value.index_select(0, self.samples.to(value.device))
        if type(value) in (tuple, list):
            parts = [self.select(v) for v in value]
            changed = any(new is not old for new, old in zip(parts, value, strict=True))
            return type(value)(parts) if changed else value  # which the branch may append to
        if type(value) is dict:
            return {key: self.select(v) for key, v in value.items()}
        return value

    def scale(self, f: Tensor) -> Tensor:
        """Give what is added of a branch's output `f` when the gate is open, [batch, ...].

        Args:
            f: [batch, ...]; under `samples` [k, ...], and the other samples get 0.

        Raises:
            GateError: when gates for single samples were drawn for another batch size.
        """
        if self.samples is not None:
            return self._spread(f if self.factor is None else f * self.factor, self.samples)
        if self.keep is not None:
            self.check_batch(len(f))
            mask = self.keep.to(f.device, f.dtype)
            if self.factor is not None:
                mask = mask * self.factor
            return f * mask.view(-1, *[1] * (f.ndim - 1))
        return f if self.factor is None else f * self.factor

    def rescale(self, out: Tensor, shortcut: Tensor) -> Tensor:
        """Give `shortcut` plus the scaled branch, where `out` is their sum without scaling.

        Args:
            out: [batch, ...]; under `samples` [k, ...].
            shortcut: [batch, ...].
        """
        if self.factor is None and self.batch is None:
            return out
        return shortcut + self.scale(out - self.select(shortcut))

    def check_batch(self, samples: int) -> None:
        """Raise `GateError` when a block gets another number of samples than the gate is for."""
        if self.batch is not None:
            _check_batch(self.batch, samples)

    def _spread(self, f: Tensor, samples: Tensor) -> Tensor:
        """[k, ...] -> [batch, ...], with zeros for the samples that are not drawn."""
        f = self.select(f)  # where it was computed for all samples, because others need it too
        _check_batch(len(samples), len(f))
        if len(samples) == self.batch:
            return f
        zeros = f.new_zeros((self.batch or 0, *f.shape[1:]))
        return zeros.index_copy(0, samples.to(f.device), f)


OPEN = Gate()


@dataclass(slots=True)
class BlockGates:
    """The gates of one block: of the training step under way (none yet: None) and of evaluation."""

    training: Gate | None = None
    evaluation: Gate = OPEN

    def now(self, training: bool) -> Gate:
        """What the block does in the forward pass under way.

        Raises:
            GateError: in training, when no gates were drawn.
        """
        if not training:
            return self.evaluation
        if self.training is None:
            raise GateError(
                "a residual block was called in training mode before gates were drawn: call the "
                "model given to sd.apply in training mode, not a part of it, or handle.draw() first"
            )
        return self.training


def draw(
    seed: int,
    step: int,
    survival: tuple[float, ...],
    batch: int | None = None,
    min_samples: int = 0,
) -> Tensor:
    """All coins of one step: bool [L], or [L, batch] with one for each sample.

    Block l is open with probability `survival[l - 1]`, independently of every other block, sample
    and step. The same arguments give the same gates everywhere; a larger p only opens more.

    Args:
        min_samples: how many samples are open in each block at least: where the coins say fewer,
            those that came closest.
    """
    blocks = len(survival)
    p = torch.tensor(survival, dtype=torch.float64)
    if batch is None:
        return uniforms(blocks, "gates", seed, step) < p
    u = uniforms(blocks * batch, "gates", seed, step).view(blocks, batch)
    coins = u < p[:, None]
    if min_samples > 0:
        coins |= u <= u.kthvalue(min(min_samples, batch), dim=1, keepdim=True).values
    return coins


def seed_of_rank(seed: int, rank: int) -> int:
    """The seed of one of several processes that each draw gates of their own."""
    return int.from_bytes(digest(7, "gates of a rank", seed, rank), "little")


def open_shares(coins: Tensor) -> Tensor:
    """The share of samples for which each block is open: float64 [L], from [L] or [L, batch]."""
    return coins.double() if coins.ndim == 1 else coins.double().mean(1)


def training_gates(
    coins: Tensor, survival: tuple[float, ...], kind: GateKind, scale: Scale
) -> list[Gate]:
    """What each block does in a training step under `coins` (from `draw`)."""
    factors = _each([1 / p for p in survival]) if scale == "training" else [None] * len(survival)
    if kind == "batch":
        return [Gate(b, factor) for b, factor in zip(coins.tolist(), factors, strict=True)]
    if kind == "sample":
        return [
            Gate(True, factor, keep=keep, batch=len(keep))
            for keep, factor in zip(coins, factors, strict=True)
        ]
    subsets = [keep.nonzero().flatten() for keep in coins]
    return [
        Gate(len(samples) > 0, factor, samples=samples, batch=coins.shape[1])
        for samples, factor in zip(subsets, factors, strict=True)
    ]


def evaluation_gates(survival: tuple[float, ...], scale: Scale) -> list[Gate]:
    """What each block does in evaluation: all open, times p_l where training did not make up."""
    factors = _each(survival) if scale == "inference" else [None] * len(survival)
    return [Gate(True, factor) for factor in factors]


def _check_batch(expected: int, samples: int) -> None:
    if samples != expected:
        raise GateError(
            f"this block got {samples} samples, the gates were drawn for {expected}: "
            "gates for single samples need the batch as the first dimension of every block; "
            'use gate="batch" for this model'
        )


def _each(factors: Sequence[float]) -> Sequence[Tensor]:
    return torch.tensor(factors, dtype=torch.float64, device="cpu").unbind()
