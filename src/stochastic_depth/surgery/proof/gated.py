"""A model with gates, as it is proved; the gates that it is proved under, and its original."""

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.block import Block, force
from stochastic_depth.choices import GateKind, Scale
from stochastic_depth.gates import OPEN, Gate
from stochastic_depth.surgery.blocks import FoundBlock
from stochastic_depth.surgery.install import ungated
from stochastic_depth.surgery.proof.reference import bypassed


@dataclass(frozen=True)
class Gated:
    """A model with gates, and what is to be proved about it.

    Blocks are given by their numbers, from 0, in `found` and in `blocks`.
    """

    model: nn.Module
    found: Sequence[FoundBlock]
    blocks: Sequence[Block]
    gate: GateKind
    scale: Scale
    batch: int | None
    """The number of samples in the example; None if a gate is for the whole mini-batch."""
    run: Callable[..., Any]
    """Calls the model on the example; its argument is a seed for the random number generators. In
    training mode it leaves out the hooks that draw gates."""
    other: Callable[..., Any]
    """As `run`, on other inputs than the example if the model can run on them."""
    drop_paths: Mapping[nn.Module, FoundBlock]
    """The drop paths that were disabled, each with a block that has it."""
    deadline: float
    """A time of `time.monotonic()`, after which no further set of blocks is closed."""

    @property
    def everything(self) -> list[int]:
        """The numbers of all blocks."""
        return list(range(len(self.found)))

    def sets(self) -> Iterator[list[int]]:
        """The sets of blocks to close; after the deadline there are no more, but always one."""
        for number, closed in enumerate(closed_sets(len(self.found))):
            if number and time.monotonic() > self.deadline:
                return
            yield closed

    @contextmanager
    def with_gate(self, gate: Gate, numbers: Collection[int] = ()) -> Iterator[None]:
        """While entered, the blocks `numbers` have `gate` in both modes, and others are open."""
        with force(self.blocks, [gate if n in numbers else OPEN for n in self.everything]):
            yield

    @contextmanager
    def original(
        self, numbers: Collection[int] = (), keep: Tensor | None = None, factor: float = 0.0
    ) -> Iterator[None]:
        """While entered, the model is the original, in which the blocks `numbers` are bypassed.

        Args:
            keep: bool [batch], the samples for which the branches are still added.
            factor: what the branches are multiplied by, if they are added for all samples.
        """
        with ungated(self.model), bypassed([self.found[n] for n in numbers], keep, factor):
            yield

    def half(self, batch: int) -> tuple[Gate, Tensor]:
        """A gate that is open for every other sample, and a mask of these samples: bool [batch]."""
        keep = torch.arange(batch, device="cpu") % 2 == 0
        if self.gate == "sample":
            return Gate(keep=keep, batch=batch), keep
        return Gate(samples=keep.nonzero().flatten(), batch=batch), keep

    def fully_open(self) -> Gate:
        """A gate of the form that training steps draw, which changes nothing."""
        scaled = self.scale == "training"
        factor = torch.ones((), dtype=torch.float64, device="cpu") if scaled else None
        if self.batch is None:
            return Gate(factor=factor)
        if self.gate == "sample":
            keep = torch.ones(self.batch, dtype=torch.bool, device="cpu")
            return Gate(factor=factor, keep=keep, batch=self.batch)
        samples = torch.arange(self.batch, device="cpu")
        return Gate(factor=factor, samples=samples, batch=self.batch)


def closed_sets(blocks: int) -> list[list[int]]:
    """Sets of blocks to close: all blocks, and then a separating family.

    A separating family: for any two blocks, some set closes the first and not the second. It is the
    smallest such family. Each block is in its own selection of half of the sets, and no selection
    contains a different one (Sperner's theorem). That is about log2 L + log2 log2 L sets instead of
    L.
    """
    numbers = range(blocks)
    if blocks < 2:
        return [list(numbers)] if blocks else []
    sets = next(n for n in itertools.count(2) if math.comb(n, n // 2) >= blocks)
    selections = list(zip(numbers, itertools.combinations(range(sets), sets // 2), strict=False))
    return [
        list(numbers),
        *([n for n, selection in selections if each in selection] for each in range(sets)),
    ]
