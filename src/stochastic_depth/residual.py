"""One residual step under a gate: a pure function, then a thin module."""

import sys
from collections.abc import Callable
from types import MethodType

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from stochastic_depth.errors import GateError, UnsupportedBlockError
from stochastic_depth.gates import OPEN, BlockGates, Gate
from stochastic_depth.torch_private import (
    backward_pass,
    function_around,
    graph_exporter,
    is_fx_tracing,
)


def residual_step(
    x: Tensor,
    branch: Callable[[Tensor], Tensor],
    shortcut: Callable[[Tensor], Tensor] | None = None,
    activation: Callable[[Tensor], Tensor] | None = None,
    gate: Gate = OPEN,
) -> Tensor:
    """H_l = act(shortcut(H) + b_l * branch(H)), where the branch is not called if b_l = 0.

    Args:
        x: H_{l-1}, [batch, ...].
        branch: f_l. Under `gate.samples` it is called on those samples only, [k, ...].
        shortcut: the path around the branch; None is the identity.
        activation: the function that follows the addition; None is the identity.
        gate: what this block does in this pass.

    Returns:
        H_l, [batch, ...].

    Raises:
        GateError: when gates for single samples were drawn for a different batch size.
        UnsupportedBlockError: when the sum does not have the shape of the shortcut. It is not
            looked at in compiled, traced and exported code.

    The paper, section 3, equations 2 and 5.

    Examples:
        >>> x, branch = torch.ones(2, 3), nn.Linear(3, 3)
        >>> out = sd.residual_step(x, branch, activation=torch.relu)
        >>> torch.equal(out, torch.relu(x + branch(x)))
        True
        >>> torch.equal(sd.residual_step(x, branch, gate=sd.Gate(open=False)), x)
        True
    """
    gate.require_batch(x.shape[0])
    out = x if shortcut is None else shortcut(x)
    if gate.open:
        with gate.forward_only():
            f = branch(gate.select(x))
        out = with_shape_of(out, out + gate.scale(f))
    return out if activation is None else activation(out)


def with_shape_of(shortcut: Tensor, total: Tensor) -> Tensor:
    """The sum `total`, after a check that its shape is that of its shortcut.

    Compiled, exported and traced code is left out.

    Raises:
        UnsupportedBlockError: when it has another shape.
    """
    if is_compiling() or is_fx_tracing() or graph_exporter() is not None:
        return total  # shapes are no numbers there
    if total.shape != shortcut.shape:
        raise UnsupportedBlockError(
            f"the sum of shortcut and branch has the shape {list(total.shape)}, and the shortcut "
            f"alone, which a closed gate returns, {list(shortcut.shape)}: give a shortcut with the "
            "shape of the sum, for example one that is expanded before the branch is computed from "
            "it"
        )
    return total


class Residual(nn.Module):
    """A residual unit whose branch can be skipped: act(shortcut(x) + branch(x)).

    By itself it is the plain unit of constant depth. `sd.apply` on the model that contains it gives
    it gates. Its parameters are named `branch.`, `shortcut.` and `activation.`.

    If the unit runs inside an `autograd.Function` whose backward recomputes it, that backward must
    call the unit. To call the branch, which has no gate, is an error.

    Args:
        branch: f_l, from [batch, ...] to the shape of the shortcut's output.
        shortcut: None for the identity, or a downsampling or projection path.
        activation: the module that follows the addition; None for pre-norm and pre-activation
            blocks.

    Raises:
        TypeError: when one of them is no module, such as a function.

    Examples:
        >>> model = nn.Sequential(*(sd.Residual(nn.Linear(8, 8)) for _ in range(4)))
        >>> sd.apply(model, sd.Uniform(0.5)).expected_depth
        2.0
    """

    gates: BlockGates | None

    def __init__(
        self,
        branch: nn.Module,
        shortcut: nn.Module | None = None,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        given = {"branch": branch, "shortcut": shortcut, "activation": activation}
        for name, module in given.items():
            if not isinstance(module, nn.Module) and (module is not None or name == "branch"):
                raise TypeError(
                    f"sd.Residual({name}={module!r}): it must be an nn.Module; for a function, "
                    "give one whose forward method calls it"
                )
        self.branch = branch
        self.shortcut = shortcut
        self.activation = activation
        self.gates = None
        self._guarded = False

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate()
        if self.gates is not None and self.training and not torch.is_grad_enabled():
            self._guard_branch()
        if not gate.open and works_in_place(self.activation):
            x = x.clone()  # the activation works in place, and x belongs to the caller
        return residual_step(x, self.branch, self.shortcut, self.activation, gate)

    def _guard_branch(self) -> None:
        """Inside an `autograd.Function`, make sure that its backward pass calls this module."""
        if self._guarded or is_compiling():
            return
        if function_around(sys._getframe()) is not None:
            self._guarded = True
            self.branch.register_forward_pre_hook(self._refuse_in_backward)

    def _refuse_in_backward(self, branch: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Hook on the branch: raise `GateError` if a backward pass calls it without the unit."""
        if self.gates is None or backward_pass() is None or _is_running(self.forward):
            return
        raise GateError(
            f"the branch of a residual unit ({type(branch).__name__}) is called in the backward "
            "pass of an autograd.Function, where it has no gate: call the unit instead"
        )

    def gate(self) -> Gate:
        """What this block does in the current forward pass.

        Raises:
            GateError: in training, outside of a forward pass that has drawn gates.
        """
        return OPEN if self.gates is None else self.gates.now(self.training)

    def extra_repr(self) -> str:
        if self.gates is None or self.gates.evaluation.factor is None:
            return ""
        return f"p={self.gates.evaluation.factor.item():.4g} in evaluation"


def works_in_place(module: nn.Module | None) -> bool:
    """Whether `module`, or a module inside it, has `inplace=True`."""
    return module is not None and any(getattr(each, "inplace", False) for each in module.modules())


def _is_running(method: MethodType) -> bool:
    """Whether this thread is inside a call of `method`."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is method.__func__.__code__ and frame.f_locals["self"] is method.__self__:
            return True
        frame = frame.f_back
    return False
