"""One residual step under a gate: a pure function, then a thin module."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from stochastic_depth.errors import GateError
from stochastic_depth.gates import OPEN, BlockGates, Gate


def residual_step(
    x: Tensor,
    branch: Callable[[Tensor], Tensor],
    shortcut: Callable[[Tensor], Tensor] | None = None,
    activation: Callable[[Tensor], Tensor] | None = None,
    gate: Gate = OPEN,
) -> Tensor:
    """H_l = act(shortcut(H) + b_l * branch(H)), with the branch not called when b_l = 0.

    Args:
        x: H_{l-1}, [batch, ...].
        branch: f_l. Under `gate.samples` it is called on those samples only, [k, ...].
        shortcut: the path around the branch; None is the identity.
        activation: what follows the addition; None is nothing.
        gate: what this block does in this pass.

    Returns:
        H_l, [batch, ...].

    Raises:
        GateError: when gates for single samples were drawn for another batch size.

    The paper, section 3, equations 2 and 5.
    """
    _check_batch(gate.batch, x.shape[0])
    out = x if shortcut is None else shortcut(x)
    if gate.open:
        out = out + scaled(branch(part(x, gate)), gate)
    return out if activation is None else activation(out)


def scaled(f: Tensor, gate: Gate) -> Tensor:
    """What is added of a branch's output `f` under an open gate, [batch, ...].

    Args:
        f: [batch, ...]; under `gate.samples` [k, ...], what other samples get is 0.
    """
    if gate.samples is not None:
        return _spread(f if gate.factor is None else f * gate.factor, gate, gate.samples)
    if gate.keep is not None:
        _check_batch(gate.batch, len(f))
        mask = gate.keep.to(f.device, f.dtype)
        if gate.factor is not None:
            mask = mask * gate.factor
        return f * mask.view(-1, *[1] * (f.ndim - 1))
    return f if gate.factor is None else f * gate.factor


def rescaled(out: Tensor, shortcut: Tensor, gate: Gate) -> Tensor:
    """`out`, which is `shortcut` plus a branch, with the branch counted as `gate` says.

    Args:
        out: [batch, ...]; under `gate.samples` [k, ...].
        shortcut: [batch, ...].
    """
    if gate.factor is None and gate.batch is None:
        return out
    return shortcut + scaled(out - part(shortcut, gate), gate)


def part(value: Any, gate: Gate) -> Any:
    """Of tensors [batch, ...] the samples that the branch runs on; all else as it is.

    Args:
        value: a tensor, or tuples, lists and mappings of anything.
    """
    if gate.samples is None:
        return value
    if isinstance(value, Tensor):
        if value.ndim == 0 or len(value) != gate.batch or len(gate.samples) == gate.batch:
            return value
        return value.index_select(0, gate.samples.to(value.device))
    if type(value) in (tuple, list):
        parts = [part(v, gate) for v in value]
        changed = any(new is not old for new, old in zip(parts, value, strict=True))
        return type(value)(parts) if changed else value  # which the branch may append to
    if type(value) is dict:
        return {key: part(v, gate) for key, v in value.items()}
    return value


def _spread(f: Tensor, gate: Gate, samples: Tensor) -> Tensor:
    """[k, ...] -> [batch, ...], with zeros for the samples that are not drawn."""
    f = part(f, gate)  # where it was computed for all samples, because others need it too
    _check_batch(len(samples), len(f))
    if len(samples) == gate.batch:
        return f
    zeros = f.new_zeros((gate.batch or 0, *f.shape[1:]))
    return zeros.index_copy(0, samples.to(f.device), f)


def _check_batch(expected: int | None, samples: int) -> None:
    if expected is not None and samples != expected:
        raise GateError(
            f"this block got {samples} samples, the gates were drawn for {expected}: "
            "gates for single samples need the batch as the first dimension of every block; "
            'use gate="batch" for this model'
        )


class Residual(nn.Module):
    """A residual unit whose branch can be skipped: act(shortcut(x) + branch(x)).

    On its own it is the plain unit of constant depth. `sd.apply` on the model that holds it gives
    it gates. Parameters are found under `branch.`, `shortcut.` and `activation.`.

    Args:
        branch: f_l, from [batch, ...] to the shape of the shortcut's output.
        shortcut: None for the identity, or a downsampling or projection path.
        activation: what follows the addition; None for pre-norm and pre-activation blocks.
    """

    gates: BlockGates | None

    def __init__(
        self,
        branch: nn.Module,
        shortcut: nn.Module | None = None,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.activation = activation
        self.gates = None
        self._overwrites = activation is not None and any(
            getattr(module, "inplace", False) for module in activation.modules()
        )

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate()
        if self._overwrites and not gate.open:
            x = x.clone()  # the activation works in place, and x is not this block's to change
        return residual_step(x, self.branch, self.shortcut, self.activation, gate)

    def gate(self) -> Gate:
        """What this block does now.

        Raises:
            GateError: in training, when the model that was applied has not drawn gates.
        """
        return OPEN if self.gates is None else self.gates.now(self.training)

    def extra_repr(self) -> str:
        if self.gates is None or self.gates.evaluation.factor is None:
            return ""
        return f"p={self.gates.evaluation.factor.item():.4g} in evaluation"
