"""The stochastic depth of one model: draws the gates, and minds the blocks that are skipped."""

import math
import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stochastic_depth.errors import GateError, StateError
from stochastic_depth.gates import (
    BlockGates,
    Gate,
    GateKind,
    Scale,
    draw,
    evaluation_gates,
    training_gates,
)
from stochastic_depth.survival import ramped

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

    def open_in_training(self, gate: Gate | None) -> None:
        """Set what the block does in the training step under way."""
        for addition in self.gates:
            addition.training = gate


class StochasticDepth:
    """What `sd.apply` returns: the survival probabilities, the gates and their state.

    Gates are drawn when the model's forward pass begins in training mode, all at once, as a
    function of (seed, step). When the backward pass of that forward pass begins they are put back,
    so that activation checkpointing recomputes every block as it was.

    Attributes:
        seed: chooses the sequence of gates.
    """

    def __init__(
        self,
        blocks: Iterable[Block],
        survival: tuple[float, ...],
        ramp_steps: int,
        gate: GateKind,
        scale: Scale,
        skipped: SkippedPolicy,
        seed: int,
        least: int = 0,
    ) -> None:
        self.blocks = list(blocks)
        self._final = survival
        self._ramp_steps = ramp_steps
        self.gate: GateKind = gate
        self.scale: Scale = scale
        self.skipped: SkippedPolicy = skipped
        self.seed = seed
        self.least = least
        self._coins: Tensor | None = None
        self._draws_since_backward = 0
        self._full_depth = False
        self._survival: tuple[float, ...] = ()
        self.step = 0

    @property
    def step(self) -> int:
        """How many training forward passes have drawn gates; the next draw is for this step.

        It may be set, to count otherwise. Set to the number of the optimizer's step before each
        forward pass, all micro-batches of that step run under the same gates, a ramp counts the
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
        """(p_1, ..., p_L); where they follow a ramp, as of the last draw."""
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
            raise GateError(f'gate="{self.gate}" draws a gate for each sample: depth.draw(batch)')
        self._set_survival(self.step)
        self._coins = draw(
            self.seed,
            self.step,
            self._survival,
            None if self.gate == "batch" else batch,
            self.least,
        )
        self._step += 1
        self._draws_since_backward += 1
        self._open(training_gates(self._coins, self._survival, self.gate, self.scale))

    @contextmanager
    def full_depth(self) -> Iterator[None]:
        """While entered, training forward passes run as evaluation does: all blocks, times p_l.

        No gates are drawn. For what needs training mode and the whole network, such as
        `torch.optim.swa_utils.update_bn`: under gates, BatchNorm in the branch of a block that
        happened to be closed would see nothing, and the others a network that is never evaluated.
        """
        was, self._full_depth = self._full_depth, True
        try:
            yield
        finally:
            self._full_depth = was
            self._open([None] * len(self.blocks))

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
                    "give what depth.state_dict() returned"
                )
        state = {"least": 0, **state}  # which states did not always have
        for name, mine in self._identity().items():
            if name not in state or state[name] != mine:
                raise StateError(
                    f"the saved state has {name}={state.get(name)!r}, this model {mine!r}: "
                    "apply stochastic depth with the settings of the run that is resumed"
                )
        self.step, self.seed = state["step"], state["seed"]
        self._coins = None
        self._open([None] * len(self.blocks))

    def before_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Hook on the model: draw, unless this is evaluation or a recomputation."""
        if not model.training:
            self._open([None] * len(self.blocks))
        elif self._full_depth:
            self._open([block.gates[0].evaluation for block in self.blocks])
        elif not _in_backward():
            self.draw(None if self.gate == "batch" else batch_size((args, kwargs)))
        elif self._draws_since_backward > 1:
            raise GateError(
                "the whole model is recomputed after several forward passes, and reentrant "
                "checkpointing does not tell which: use checkpoint(..., use_reentrant=False)"
            )

    def after_forward(self, model: nn.Module, args: tuple, output: Any) -> None:
        """Hook on the model: be there when the backward pass of this forward pass begins."""
        if not model.training or not torch.is_grad_enabled():
            return
        refuse_cache(output)
        gates = [block.gates[0].training for block in self.blocks]

        def backward_begins(_: Tensor) -> None:
            self._draws_since_backward = 0
            self._open(gates)
            if self.skipped == "paper":
                self._zero_gradients_of_closed(model, gates)

        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(backward_begins)

    def _set_survival(self, step: int) -> None:
        survival = ramped(self._final, self._ramp_steps, step)
        if survival == self._survival:
            return
        self._survival = survival
        gates = evaluation_gates(self._survival, self.scale)
        for block, gate in zip(self.blocks, gates, strict=True):
            for addition in block.gates:
                addition.evaluation = gate

    def _open(self, gates: Iterable[Gate | None]) -> None:
        for block, gate in zip(self.blocks, gates, strict=True):
            for addition in block.gates:
                addition.training = gate

    def _zero_gradients_of_closed(self, model: nn.Module, gates: Iterable[Gate | None]) -> None:
        for block, gate in zip(self.blocks, gates, strict=True):
            if gate is not None and not gate.open:
                for name in block.parameters:
                    parameter = _parameter(model, name)
                    if parameter.requires_grad and parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)

    def _identity(self) -> dict[str, Any]:
        return {
            "survival": list(self._final),
            "ramp_steps": self._ramp_steps,
            "gate": self.gate,
            "least": self.least,
            "scale": self.scale,
            "skipped": self.skipped,
        }

    def __repr__(self) -> str:
        return (
            f"StochasticDepth({len(self.blocks)} blocks, p from {self._survival[0]:.4g} to "
            f"{self._survival[-1]:.4g}, expected depth {self.expected_depth:.4g}, "
            f"gate={self.gate!r}, scale={self.scale!r}, skipped={self.skipped!r}, "
            f"seed={self.seed}, step={self.step})"
        )


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


def _in_backward() -> bool:
    """Whether autograd is at work, so that a forward pass is a recomputation."""
    return torch._C._current_graph_task_id() != -1


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    """`model.get_parameter(name)` without its checks, which cost more than the zeros."""
    *path, last = name.split(".")
    for part in path:
        model = model._modules[part]  # type: ignore[assignment]
    return model._parameters[last]  # type: ignore[return-value]


def refuse_cache(output: object) -> None:
    """Raise `GateError` when a model in training returns a cache of keys and values."""
    if getattr(output, "past_key_values", None) is not None:
        raise GateError(
            "the model returns past_key_values in training, which closed blocks put nothing into: "
            "call it with use_cache=False, or set model.config.use_cache = False"
        )


def batch_size(inputs: object) -> int:
    """The number of samples in the inputs of a model: that of the first tensor among them.

    Raises:
        GateError: when there is none.
    """
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.ndim > 0:
            return len(leaf)
    raise GateError("gates for single samples need a tensor [batch, ...] among the model's inputs")
