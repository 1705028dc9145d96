"""One residual step under a gate: a pure function, then a thin module."""

from collections.abc import Callable

from torch import Tensor, nn

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
    gate.check_batch(x.shape[0])
    out = x if shortcut is None else shortcut(x)
    if gate.open:
        with gate.forward_only():
            f = branch(gate.select(x))
        out = out + gate.scale(f)
    return out if activation is None else activation(out)


class Residual(nn.Module):
    """A residual unit whose branch can be skipped: act(shortcut(x) + branch(x)).

    On its own it is the plain unit of constant depth. `sd.apply` on the model that holds it gives
    it gates. Parameters are found under `branch.`, `shortcut.` and `activation.`.

    An `autograd.Function` around it whose own backward pass computes branches again, as that of
    reversible layers does, gives wrong gradients, for it knows no gates. `sd.apply` refuses it
    where an example is given; without one it cannot see it.

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
