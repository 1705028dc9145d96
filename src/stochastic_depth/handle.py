"""The stochastic depth of one model: its survival probabilities, gates and their state."""

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from stochastic_depth.errors import GateError, StateError
from stochastic_depth.gates import (
    BlockGates,
    Closed,
    Gate,
    GateKind,
    Scale,
    draw,
    evaluation_gates,
    training_gates,
)
from stochastic_depth.survival import Probabilities

SkippedPolicy = Literal["paper", "freeze"]
"""A skipped block's parameters: gradient zero, so the optimizer still moves them, or None."""


@dataclass
class Block:
    """One residual block of a model: open or closed as a whole."""

    name: str
    gates: tuple[BlockGates, ...]
    """One for each of its additions."""
    parameters: tuple[str, ...]
    """Names, in the model, of the parameters of its branch."""

    @property
    def in_training(self) -> Gate | None:
        """What the block does in the training step under way."""
        return self.gates[0].training

    @property
    def in_evaluation(self) -> Gate:
        """What it does in evaluation."""
        return self.gates[0].evaluation

    def open_in_training(self, gate: Gate | None) -> None:
        """Set what the block does in the training step under way."""
        for addition in self.gates:
            addition.training = gate


def open_in_training(blocks: Iterable[Block], gates: Iterable[Gate | None]) -> None:
    """Set what each block does in the training step under way."""
    for block, gate in zip(blocks, gates, strict=True):
        block.open_in_training(gate)


class Handle:
    """What `sd.apply` returns: the survival probabilities, the gates and their state.

    Gates are drawn when the model's forward pass begins in training mode, all at once, as a
    function of (seed, step).

    Attributes:
        seed: chooses the sequence of gates.
        rank: which of several processes this is, if each draws gates of its own.
        share: where the samples of this process begin in a mini-batch of several, and how many
            samples that has; for gates for single samples.
        parts: how many processes share a mini-batch, in equal parts: each of them is balanced.
    """

    def __init__(
        self,
        blocks: Iterable[Block],
        survival: Probabilities,
        gate: GateKind,
        scale: Scale,
        skipped: SkippedPolicy,
        seed: int,
        min_samples: int = 0,
        balance: bool = False,
        multiple_of: int = 1,
        closed: Closed = "skipped",
    ) -> None:
        self.blocks = list(blocks)
        self.probabilities = survival
        self.gate: GateKind = gate
        self.scale: Scale = scale
        self.skipped: SkippedPolicy = skipped
        self.seed = seed
        self.rank: int | None = None
        self.share: tuple[int, int] | None = None
        self.parts = 1
        self.min_samples = min_samples
        self.balance = balance
        self.multiple_of = multiple_of
        self.closed: Closed = closed
        self._coins: Tensor | None = None
        self.at_full_depth = False
        """Whether `full_depth` is entered."""
        self._survival: tuple[float, ...] = ()
        self._subnetwork: tuple[Tensor, bool] | None = None
        self.step = 0

    @property
    def step(self) -> int:
        """How many training forward passes have drawn gates; the next draw is for this step.

        It may be set, to count otherwise. Set to the number of the optimizer's step before each
        forward pass, all micro-batches of that step run under the same gates, a schedule counts the
        optimizer's steps, and a checkpoint that has that number has the gates.

        Raises:
            GateError: when set to what is no integer, or to a negative one.
        """
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        number = integer("step", step)
        if number < 0:
            raise GateError(f"step={number}: steps are counted from 0")
        self._step = number
        self._set_survival(max(0, self._step - 1))

    @property
    def survival(self) -> tuple[float, ...]:
        """(p_1, ..., p_L); where they follow a schedule, as of the last draw."""
        return self._survival

    @property
    def expected_depth(self) -> float:
        """The expected number of active blocks, sum of p_l (the paper, section 3)."""
        return math.fsum(self._survival)

    @property
    def gates(self) -> Tensor:
        """The gates of the current step: bool [L], or [L, batch] with gates for single samples.

        Raises:
            GateError: before the first draw.
        """
        if self._coins is None:
            raise GateError("no gates yet: they are drawn by the first training forward pass")
        return self._coins.clone()

    def draw(self, batch: int | None = None) -> None:
        """Draw the gates of the next step. The model's forward pass does this by itself.

        Args:
            batch: number of samples; needed by the "sample" and "subset" gates.
        """
        if self.gate != "batch" and batch is None:
            raise GateError(f'gate="{self.gate}" draws a gate for each sample: handle.draw(batch)')
        self._set_survival(self.step)
        first, whole = self.share or (0, batch)
        coins = self.gates_at(self.step, whole)
        self._coins = coins if coins.ndim == 1 else coins[:, first : first + (batch or 0)]
        self._step += 1
        open_in_training(
            self.blocks,
            training_gates(
                self._coins, self._survival, self.gate, self.scale, self.balance, self.closed
            ),
        )

    def gates_at(self, step: int, batch: int | None = None) -> Tensor:
        """The gates that training step `step` draws, past or to come: as `gates`.

        Args:
            batch: number of samples, of all processes; needed by the "sample" and "subset" gates.
        """
        return draw(
            self.seed,
            step,
            self.survival_at(step),
            None if self.gate == "batch" else batch,
            self.min_samples,
            balance=self.balance,
            multiple_of=self.multiple_of,
            parts=self.parts,
            rank=self.rank,
        )

    def survival_at(self, step: int) -> tuple[float, ...]:
        """(p_1, ..., p_L) in training step `step`."""
        return self.probabilities.at(step)

    @contextmanager
    def subnetwork(self, gates: Sequence[bool] | Tensor, *, scaled: bool = False) -> Iterator[None]:
        """While entered, the model in evaluation mode is one of its 2^L subnetworks.

            with handle.subnetwork(handle.gates):
                logits = model(images)

        The branch of a closed block is not executed. Training steps are not concerned, and what
        was before comes back at the end. Subnetworks may be entered inside of one another: the
        innermost counts.

        Args:
            gates: which blocks are open, bool [L]. All open gives the full network unscaled.
            scaled: whether an open branch is multiplied as in the full network in evaluation (by
                p_l under scale="inference"). If not, it counts as it does in a training step:
                fully (the paper), or over p_l under scale="training".

        Raises:
            GateError: when `gates` is not one bool for each block; or a model gives back a cache
                of keys and values, into which closed blocks put nothing.
        """
        chosen = torch.as_tensor(gates, device="cpu").clone()
        if chosen.dtype != torch.bool or chosen.shape != (len(self.blocks),):
            raise GateError(
                f"a subnetwork is given by bool [{len(self.blocks)}], one gate for each block, not "
                f"by {chosen.dtype} {list(chosen.shape)}"
            )
        before, self._subnetwork = self._subnetwork, (chosen, scaled)
        self._set_evaluation()
        try:
            yield
        finally:
            self._subnetwork = before
            self._set_evaluation()

    @property
    def is_subnetwork(self) -> bool:
        """Whether `subnetwork` is entered."""
        return self._subnetwork is not None

    @contextmanager
    def full_depth(self) -> Iterator[None]:
        """While entered, training forward passes run as evaluation does: all blocks, times p_l.

        No gates are drawn. For what needs training mode and the whole network, such as
        `torch.optim.swa_utils.update_bn`: under gates, BatchNorm in the branch of a block that
        happened to be closed would see nothing, and the others a network that is never evaluated.
        """
        was, self.at_full_depth = self.at_full_depth, True
        try:
            yield
        finally:
            self.at_full_depth = was
            open_in_training(self.blocks, [None] * len(self.blocks))

    def state_dict(self) -> dict[str, Any]:
        """All that a checkpoint needs for the same gates after a resume."""
        return {"seed": self.seed, "step": self.step, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            StateError: when it belongs to other survival probabilities, gates or scaling.
        """
        for name in ("seed", "step"):
            if not isinstance(state.get(name), int):
                raise StateError(
                    f"the saved state has {name}={state.get(name)!r}, which must be an integer: "
                    "give what handle.state_dict() returned"
                )
        for name, mine in self._identity().items():
            if name not in state or state[name] != mine:
                raise StateError(
                    f"the saved state has {name}={state.get(name)!r}, this model {mine!r}: "
                    "apply stochastic depth with the settings of the run that is resumed"
                )
        self.step, self.seed = state["step"], state["seed"]
        self._coins = None
        open_in_training(self.blocks, [None] * len(self.blocks))

    def _set_survival(self, step: int) -> None:
        survival = self.survival_at(step)
        if survival == self._survival:
            return
        self._survival = survival
        self._set_evaluation()

    @torch.inference_mode(False)  # in which a factor would be one that no gradient can pass
    def _set_evaluation(self) -> None:
        gates = evaluation_gates(self._survival, self.scale)
        if self._subnetwork is not None:
            coins, scaled = self._subnetwork
            if not scaled:
                gates = training_gates(coins, self._survival, "batch", self.scale)
            gates = [g._replace(open=b) for g, b in zip(gates, coins.tolist(), strict=True)]
        for block, gate in zip(self.blocks, gates, strict=True):
            for addition in block.gates:
                addition.evaluation = gate

    def _identity(self) -> dict[str, Any]:
        return {
            **self.probabilities.described(),
            "gate": self.gate,
            "min_samples": self.min_samples,
            "balance": self.balance,
            "multiple_of": self.multiple_of,
            "closed": self.closed,
            "scale": self.scale,
            "skipped": self.skipped,
        }

    def __repr__(self) -> str:
        return (
            f"Handle({len(self.blocks)} blocks, p from {self._survival[0]:.4g} to "
            f"{self._survival[-1]:.4g}, expected depth {self.expected_depth:.4g}, "
            f"gate={self.gate!r}, {'balanced, ' if self.balance else ''}{self._described()}"
            f"skipped={self.skipped!r}, seed={self.seed}, step={self.step})"
        )

    def _described(self) -> str:
        """What of the settings is not the default, for `repr`."""
        schedule = self.probabilities.described()["schedule"]
        named = f"schedule={schedule['name']}, " if schedule else ""
        closed = "closed='forward-only', " if self.closed == "forward-only" else ""
        return f"{named}{closed}scale={self.scale!r}, "


def integer(name: str, value: object) -> int:
    """`value` as the integer that it is, of whatever library.

    Raises:
        GateError: when it is none.
    """
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise GateError(
            f"{name}={value!r}: gates are a function of integers (seed, step)"
        ) from None
