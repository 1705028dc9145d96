"""Gates: what a block does in one forward pass, and what a gate does with its branch."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from stochastic_depth.choices import Closed, GateKind, Scale
from stochastic_depth.errors import GateError
from stochastic_depth.tensors import map_structure
from stochastic_depth.torch_private import backward_pass, is_fx_tracing


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
            mask = self.keep.to(f.device, f.dtype).view(-1, *[1] * (f.ndim - 1))
            # The mask is not multiplied by the factor, which would be rounded to its precision.
            return f * mask if self.factor is None else f * mask * self.factor
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
    recall: Callable[[bool], Gate | None] | None = field(default=None, repr=False, compare=False)
    """Returns the gate that the original forward pass had in this mode (`training`) while a
    backward pass recomputes the block; otherwise it returns None."""

    def now(self, training: bool) -> Gate:
        """What the block does in the current forward pass.

        Raises:
            GateError: in training, outside of a forward pass that has drawn gates; in a
                recomputation, where it is not known which gates its forward pass had; and while
                torch.fx traces the model.
        """
        if not is_compiling():
            if is_fx_tracing():
                raise GateError(
                    "torch.fx traces the model (as symbolic_trace and create_feature_extractor "
                    "do), and the graph would have the gates of this one pass for ever: call "
                    "sd.fold(model, example), which leaves the network of evaluation, or "
                    "sd.remove(model) before the trace; for features in training, use "
                    "module.register_forward_hook"
                )
            if self.recall is not None and backward_pass() is not None:
                recalled = self.recall(training)
                if recalled is not None:
                    return recalled
        if not training:
            return self.evaluation
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
        # `recall` would bring all other blocks along.
        copied = {"training": None, "evaluation": evaluation, "unforced": None, "recall": None}
        return None, copied


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
        coins: bool [L], or [L, batch] for the sample and subset gates.
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
            Gate(p > 0 or kept, factor, keep=keep, batch=len(keep))
            for keep, kept, factor, p in zip(
                coins, coins.any(1).tolist(), factors, survival, strict=True
            )
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
