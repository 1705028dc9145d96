"""Which blocks run in a step: a pure function of (seed, step)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

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


def _each(factors: Sequence[float]) -> Sequence[Tensor]:
    return torch.tensor(factors, dtype=torch.float64, device="cpu").unbind()
