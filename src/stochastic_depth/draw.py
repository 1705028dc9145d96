"""Draw the gates of a training step, as a pure function of (seed, step)."""

import functools
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.distributions import Binomial

from stochastic_depth.errors import GateError
from stochastic_depth.numbers import whole_number
from stochastic_depth.randomness import digest, uniforms


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

    Block l is open with probability `survival[l - 1]`, independently of every other step, and
    unless balanced of every other block and sample. The same arguments give the same coins
    everywhere. Unless balanced, a block that is open at some p_l is open in the same step at every
    larger one.

    Args:
        survival: (p_1, ..., p_L) in this step.
        batch: how many samples the mini-batch has in all processes; None for one coin for each
            block.
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
        return torch.cat(
            [
                _smallest(u[:, first:end], survival, min_samples, multiple_of)
                for first, end in _divided(batch, parts)
            ],
            dim=1,
        )
    p = torch.tensor(survival, dtype=torch.float64, device="cpu")[:, None]
    coins = u < p
    if min_samples > 0 and batch > 0:
        smallest = u <= u.kthvalue(min(min_samples, batch), dim=1, keepdim=True).values
        coins |= smallest & (p > 0)
    return coins


def _divided(count: int, parts: int) -> Iterator[tuple[int, int]]:
    """The range, from `first` to below `end`, of each of `parts` consecutive parts of `count`."""
    return pairwise(part * count // parts for part in range(parts + 1))


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
    ranges = _divided(len(u), parts)
    return [n + first for first, end in ranges for n in u[first:end].argsort().tolist()]


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
    if p in (0, 1) or least <= 0:
        return p
    k = torch.arange(least, dtype=torch.float64, device="cpu")
    few = Binomial(samples, torch.tensor(p, dtype=torch.float64, device="cpu")).log_prob(k).exp()
    return p + ((least - k) @ few).item() / samples


def open_share(
    p: float,
    samples: int,
    *,
    first: int,
    whole: int,
    min_samples: int,
    balance: bool,
    multiple_of: int,
    parts: int,
) -> float:
    """The expected share of `samples` samples that `draw` opens for a block.

    It is p, unless the number of samples is rounded or has a minimum.

    Args:
        first, whole: where these samples begin in the mini-batch, and how many samples that has.
        min_samples, balance, multiple_of, parts: as for `draw`.
    """
    if not balance:
        return expected_share(p, whole, min_samples)
    opened = 0.0
    for start, end in _divided(whole, parts):
        here = min(end, first + samples) - max(start, first)
        if here > 0:
            opened += here * subset_size(p, end - start, min_samples, multiple_of) / (end - start)
    return opened / samples if samples else p


def open_shares(coins: Tensor) -> Tensor:
    """The share of samples for which each block is open, of [L] or [L, batch]: float64 [L]."""
    return coins.double() if coins.ndim == 1 else coins.double().mean(1)


def step_number(step: object) -> int:
    """`step` as a Python integer.

    Raises:
        GateError: when it is not an integer, or below 0.
    """
    number = integer("step", step)
    if number < 0:
        raise GateError(f"step={number}: steps are counted from 0")
    return number


def integer(name: str, value: object) -> int:
    """`value` as a Python integer, from an integer of any library.

    Raises:
        GateError: when it is not an integer.
    """
    number = whole_number(value)
    if number is None:
        raise GateError(f"{name}={value!r}: gates are a function of integers (seed, step)")
    return number
