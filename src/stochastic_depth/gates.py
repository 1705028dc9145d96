"""Gates: which blocks run in a step, as a pure function of (seed, step)."""

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stochastic_depth.choices import Closed, GateKind, Scale
from stochastic_depth.errors import GateError
from stochastic_depth.randomness import digest, uniforms
from stochastic_depth.tensors import map_structure


class Gate(NamedTuple):
    """What one block does in one forward pass.

    Examples:
        >>> gate = sd.Gate(open=False)
        >>> x = torch.ones(2)
        >>> x + gate.scale(x * x) if gate.open else x
        tensor([1., 1.])
    """

    open: bool = True
    """b_l: whether the branch runs at all."""
    factor: Tensor | None = None
    """float64 [] on the CPU: the number that the branch is multiplied by; None stands for 1.

    It is a tensor because the compiler would treat a float as a constant, and compile again for
    each value."""
    keep: Tensor | None = None
    """bool [batch]: the branch runs on every sample, and is added for these samples only."""
    samples: Tensor | None = None
    """int64 [k]: the branch runs on these samples only."""
    batch: int | None = None
    """The number of samples that `keep` or `samples` were drawn for."""
    detached: bool = False
    """Whether the branch only runs forward: its output is added, and no gradient passes through
    it."""

    @property
    def learns(self) -> bool:
        """Whether the branch runs and gradients pass through it."""
        return self.open and not self.detached

    @property
    def is_plain(self) -> bool:
        """Whether the branch is added unchanged, as without a gate."""
        return self.learns and self.factor is None and self.batch is None

    def forward_only(self) -> AbstractContextManager[Any]:
        """The context that the branch runs in: without a graph if it is detached."""
        return torch.no_grad() if self.detached else nullcontext()

    def select(self, value: Any) -> Any:
        """Select the samples that the branch runs on: [batch, ...] -> [k, ...].

        Args:
            value: a tensor, or nested tuples, lists and dicts that contain tensors. Everything that
                is not a tensor [batch, ...] is returned unchanged.
        """
        samples = self.samples
        if samples is None or len(samples) == self.batch:
            return value

        def select(tensor: Tensor, _: Any) -> Tensor:
            if tensor.ndim == 0 or len(tensor) != self.batch:
                return tensor
            return tensor.index_select(0, samples.to(tensor.device))

        return map_structure(select, value)

    def scale(self, f: Tensor) -> Tensor:
        """The output `f` of a branch, scaled as an open gate adds it: [batch, ...].

        Args:
            f: [batch, ...]; under `samples` it is [k, ...], and the other samples of the result are
                0.

        Raises:
            GateError: when gates for single samples were drawn for a different batch size.
        """
        if self.detached:
            return f.detach()
        if self.samples is not None:
            return self._spread(f if self.factor is None else f * self.factor, self.samples)
        if self.keep is not None:
            self.require_batch(len(f))
            mask = self.keep.to(f.device, f.dtype)
            if self.factor is not None:
                mask = mask * self.factor
            return f * mask.view(-1, *[1] * (f.ndim - 1))
        return f if self.factor is None else f * self.factor

    def rescale(self, out: Tensor, shortcut: Tensor) -> Tensor:
        """`shortcut` plus the scaled branch, where `out` is their sum without scaling.

        Args:
            out: [batch, ...]; under `samples` [k, ...].
            shortcut: [batch, ...].
        """
        if self.detached:
            return out.detach() + (shortcut - shortcut.detach())  # adds 0, and passes the gradient
        if self.factor is None and self.batch is None:
            return out
        return shortcut + self.scale(out - self.select(shortcut))

    def require_batch(self, samples: int) -> None:
        """Raise `GateError` unless a block gets as many samples as its gate was drawn for."""
        if self.batch is not None:
            _require_batch(self.batch, samples)

    def _spread(self, f: Tensor, samples: Tensor) -> Tensor:
        """[k, ...] -> [batch, ...], with zeros for the samples that are not drawn."""
        f = self.select(f)  # it holds all samples if other code needs them too
        _require_batch(len(samples), len(f))
        if len(samples) == self.batch:
            return f
        zeros = f.new_zeros((self.batch or 0, *f.shape[1:]))
        return zeros.index_copy(0, samples.to(f.device), f)


OPEN, CLOSED = Gate(), Gate(open=False)


@dataclass(slots=True)
class BlockGates:
    """The gates of one addition of a block: in evaluation, and in the current training pass."""

    training: Gate | None = None
    """None between training passes."""
    evaluation: Gate = OPEN
    unforced: Gate | None = None
    """The gate in evaluation without forced gates; None while none are forced."""
    recall: Callable[[], Gate | None] | None = field(default=None, repr=False, compare=False)
    """Returns the gate of the original forward pass while a backward pass recomputes the block;
    otherwise it returns None."""

    def now(self, training: bool) -> Gate:
        """What the block does in the current forward pass.

        Raises:
            GateError: in training, outside of a forward pass that has drawn gates.
        """
        if not training:
            return self.evaluation
        if not torch.compiler.is_compiling() and self.recall is not None:
            recalled = self.recall()
            if recalled is not None:
                return recalled
        if self.training is None:
            raise GateError(
                "a residual block was called in training mode outside of a forward pass of the "
                "model that sd.apply was given, so no gates are drawn for it: call that model "
                "(model(x), not a part of it, nor model.forward(x)), or draw gates for the parts "
                "that are called: with handle.draw(): features = model.forward_features(x)"
            )
        return self.training

    def __getstate__(self) -> tuple[None, dict[str, Any]]:
        """A copy is in no forward pass, and no gate is forced in it."""
        evaluation = self.unforced or self.evaluation
        copied = {"training": None, "evaluation": evaluation, "unforced": None}
        return None, {**copied, "recall": self.recall}


def draw(
    seed: int,
    step: int,
    survival: tuple[float, ...],
    batch: int | None = None,
    min_samples: int = 0,
    *,
    balance: bool = False,
    multiple_of: int = 1,
    parts: int = 1,
    rank: int | None = None,
) -> Tensor:
    """Draw the coins of one step: bool [L], or [L, batch] with one coin for each sample.

    Block l is open with probability `survival[l - 1]`, independently of every other block, sample
    and step. The same arguments give the same coins everywhere. A larger p_l opens a block in more
    steps, and in all steps in which a smaller one does.

    Args:
        min_samples: the smallest number of open samples in each block with p_l > 0. Where the coins
            open fewer, the samples with the next smallest random numbers are opened too.
        balance: whether to open a constant number of blocks, see `balanced_blocks`, or of the
            samples of each block, see `subset_size`. Which ones are open is still random.
        multiple_of: the number of balanced samples is rounded to a multiple of this.
        parts: how many processes share the batch, in equal parts; each part is balanced.
        rank: the rank of this process, if each process draws different gates.
    """
    blocks = len(survival)
    own = seed if rank is None else seed_of_rank(seed, rank)
    if batch is None:
        if balance:
            return balanced_blocks(
                survival,
                order=_random_order(uniforms(blocks, "order of blocks", own, step)),
                start=float(uniforms(1, "start", seed, step)),
            )
        return uniforms(blocks, "gates", own, step) < torch.tensor(
            survival, dtype=torch.float64, device="cpu"
        )
    u = uniforms(blocks * batch, "gates", own, step).view(blocks, batch)
    if balance:
        ends = [part * batch // parts for part in range(parts + 1)]
        return torch.cat(
            [
                _smallest(u[:, first:end], survival, min_samples, multiple_of)
                for first, end in pairwise(ends)
            ],
            dim=1,
        )
    p = torch.tensor(survival, dtype=torch.float64, device="cpu")[:, None]
    coins = u < p
    if min_samples > 0 and batch > 0:
        smallest = u <= u.kthvalue(min(min_samples, batch), dim=1, keepdim=True).values
        coins |= smallest & (p > 0)
    return coins


def balanced_blocks(survival: tuple[float, ...], order: Sequence[int], start: float) -> Tensor:
    """The open blocks in a step of constant depth: bool [L].

    The number of open blocks is the floor or the ceiling of the sum of p_l, and block l is open
    with probability p_l, to within 2**-44. This is systematic sampling (Madow 1949): the blocks are
    laid end to end in `order`, each as long as its p_l, and a block is open if it covers one of the
    points `start`, `start` + 1, `start` + 2, ... In a random order any two blocks are nearly
    independent. A deep network is laid out third by third, each in a random order. Then in each
    third, too, the number of open blocks is the sum of its p_l to within one, and the memory and
    the FLOPs of a step, which differ from stage to stage, vary little.

    Args:
        order: a permutation of the blocks, from 0.
        start: in [0, 1). Processes with the same `start` open equally many blocks in any order.
    """
    lengths = _in_units(survival)
    gates = [False] * len(survival)
    reached = _UNITS - 1 - int(start * _UNITS)
    for block in order:
        before, reached = reached, reached + lengths[block]
        gates[block] = reached // _UNITS > before // _UNITS
    return torch.tensor(gates, dtype=torch.bool, device="cpu")


_FEWEST_IN_A_PART = 9
"""The smallest number of blocks that are put into a random order together. The fewer there are, the
more two of them depend on each other."""


def _random_order(u: Tensor) -> list[int]:
    """The blocks from 0, sorted by `u` within up to three consecutive parts of equal size."""
    parts = max(1, min(3, len(u) // _FEWEST_IN_A_PART))
    ends = [part * len(u) // parts for part in range(parts + 1)]
    return [n + first for first, end in pairwise(ends) for n in u[first:end].argsort().tolist()]


_UNITS = 2**44
"""Lengths are whole numbers of this unit, so that rounding does not make the number of open blocks
depend on the order."""


@functools.lru_cache(maxsize=64)
def _in_units(survival: tuple[float, ...]) -> list[int]:
    """Each p_l in units of 2**-44, rounded so that their sum is the rounded sum."""
    units = [round(p * _UNITS) for p in survival]
    excess = sum(units) - round(math.fsum(survival) * _UNITS)
    for block, length in enumerate(units):
        if excess and 0 < length < _UNITS:
            one = 1 if excess > 0 else -1
            units[block] -= one
            excess -= one
    return units


def subset_size(p: float, samples: int, min_samples: int = 0, multiple_of: int = 1) -> int:
    """How many of `samples` samples a balanced gate opens: the share p, rounded, but at least one.

    At p = 0, when a block does not run yet, it opens none. DINOv2 and DINOv3 train with subsets of
    constant size too.
    """
    if p in (0, 1):
        return int(p) * samples
    rounded = multiple_of * round(p * samples / multiple_of)
    return min(max(rounded, multiple_of, min_samples), samples)


def _smallest(u: Tensor, survival: tuple[float, ...], min_samples: int, multiple_of: int) -> Tensor:
    """Mark as many of the smallest numbers in each row as must be open: bool [L, samples]."""
    sizes = [subset_size(p, u.shape[1], min_samples, multiple_of) for p in survival]
    return u.argsort(1).argsort(1) < torch.tensor(sizes, device="cpu")[:, None]


def seed_of_rank(seed: int, rank: int) -> int:
    """The seed of one process, if each process draws different gates."""
    return int.from_bytes(digest(7, "gates of a rank", seed, rank), "little")


@functools.lru_cache(maxsize=1024)
def expected_share(p: float, samples: int, min_samples: int) -> float:
    """The expected share of `samples` samples that are open where at least `min_samples` are.

    Without a minimum it is p. With one, too few open samples are as many more: p plus the sum over
    k < `min_samples` of (`min_samples` - k) / `samples` times the probability of k open samples.
    """
    least = min(min_samples, samples)
    missing = (
        (least - k) * math.comb(samples, k) * p**k * (1 - p) ** (samples - k) for k in range(least)
    )
    return p + math.fsum(missing) / samples if p > 0 and samples else p


def open_shares(coins: Tensor) -> Tensor:
    """The share of samples for which each block is open, of [L] or [L, batch]: float64 [L]."""
    return coins.double() if coins.ndim == 1 else coins.double().mean(1)


def training_gates(
    coins: Tensor,
    survival: tuple[float, ...],
    kind: GateKind,
    scale: Scale,
    shares: Sequence[float] | None = None,
    closed: Closed = "skipped",
) -> list[Gate]:
    """The gates of all blocks in a training step, from its coins, which `draw` returns.

    Args:
        shares: the share of the samples that each block runs on in expectation, by which
            scale="training" divides its branch; by default p_l.
    """
    factors: Sequence[Tensor | None] = [None] * len(survival)
    if scale == "training":
        factors = _each([1 / share if share else 1.0 for share in shares or survival])
    if closed == "forward-only":
        return [Gate(detached=not b) for b in coins.tolist()]
    if kind == "batch" and scale != "training":
        return [OPEN if b else CLOSED for b in coins.tolist()]
    if kind == "batch":
        return [Gate(b, factor) for b, factor in zip(coins.tolist(), factors, strict=True)]
    if kind == "sample":
        return [
            Gate(p > 0, factor, keep=keep, batch=len(keep))
            for keep, factor, p in zip(coins, factors, survival, strict=True)
        ]
    subsets = [keep.nonzero().flatten() for keep in coins]
    return [
        Gate(len(samples) > 0, factor, samples=samples, batch=coins.shape[1])
        for samples, factor in zip(subsets, factors, strict=True)
    ]


def evaluation_gates(survival: tuple[float, ...], scale: Scale) -> list[Gate]:
    """The gates of all blocks in evaluation: open, times p_l if training does not correct for it.

    A block with p_l = 0 has not run in training yet, and is closed.
    """
    if scale == "none":
        return [OPEN] * len(survival)
    factors = _each(survival) if scale == "inference" else [None] * len(survival)
    return [Gate(p > 0, factor) for p, factor in zip(survival, factors, strict=True)]


def _require_batch(expected: int, samples: int) -> None:
    if samples != expected:
        raise GateError(
            f"this block got {samples} samples, but the gates were drawn for {expected}. Gates for "
            "single samples need the batch as the first dimension of the input of every block: "
            'use gate="batch" for this model'
        )


def _each(factors: Sequence[float]) -> Sequence[Tensor]:
    return torch.tensor(factors, dtype=torch.float64, device="cpu").unbind()
