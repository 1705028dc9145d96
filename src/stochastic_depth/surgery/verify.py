"""`sd.verify`: prove what stochastic depth does to a model, and time what it saves."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stochastic_depth.errors import ApplyError
from stochastic_depth.handle import Handle
from stochastic_depth.plain_text import plain_table
from stochastic_depth.surgery.applied import applied_to, owner_of
from stochastic_depth.surgery.example import Example, caller
from stochastic_depth.surgery.flops import CountFlops
from stochastic_depth.surgery.model_state import preserve_state
from stochastic_depth.surgery.proof.prove import prove
from stochastic_depth.surgery.proof.training import train_once
from stochastic_depth.surgery.refuse import refuse_nested, refuse_sharded
from stochastic_depth.timing import take_turns
from stochastic_depth.torch_private import uncompiled


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The result of `sd.verify`; printed, it is a table of the FLOPs and the time saved."""

    blocks: int
    sets: int
    """How many sets of closed blocks were compared with the original model."""
    difference: float
    """The largest difference of outputs in these comparisons, relative to the largest output. With
    all gates open the difference is 0."""
    flops: tuple[float, float, float]
    """FLOPs of a training step with all blocks open, with every other block open, and with none
    open, as shares of the first."""
    seconds: tuple[float, float, float]
    """Median seconds of these three training steps."""

    @property
    def efficiency(self) -> float:
        """Time saved over FLOPs saved, with every other block open; nan without saving."""
        saved = 1 - self.flops[1]
        return (1 - self.seconds[1] / self.seconds[0]) / saved if saved else math.nan

    def __str__(self) -> str:
        rows = [
            (name, f"{flops:.3f}", f"{1000 * seconds:.4g} ms", f"{seconds / self.seconds[0]:.3f}")
            for name, flops, seconds in zip(
                ("all", "every other", "none"), self.flops, self.seconds, strict=True
            )
        ]
        return "\n".join(
            [
                plain_table(("blocks open", "FLOPs", "training step", "time"), rows, left=1),
                f"{self.blocks} blocks verified in {self.sets} sets, largest difference "
                f"{self.difference:.1g}",
                f"time saved over FLOPs saved, with every other block open: {self.efficiency:.2f}",
            ]
        )


@uncompiled()
def verify(model: nn.Module, example: Example, *, repeats: int = 5) -> Verification:
    """Prove, on this model and example, that closed blocks are skipped and nothing else changes.

    With every gate open, the outputs equal those of the original model, bit for bit. Several sets
    of blocks are closed, such that for any two blocks some set closes the first and not the second;
    the outputs equal those of the original model in which the additions of these blocks return
    their shortcut, in evaluation and in training mode. No module of a closed branch is called, and
    training steps work. With gates for single samples, a batch of half of the samples gives them
    the same outputs as the whole batch. `sd.apply` checks the same. Then forward and backward
    passes are timed, in turns. The model is not changed.

    Args:
        model: a model that `sd.apply` was called on.
        example: the inputs of one forward call; for realistic times, a batch as in training.
        repeats: how many rounds are timed.

    Raises:
        ApplyError: when `sd.apply` was not called on `model`; or when there are gates for single
            samples, and the example has one sample, or its first dimension is not the batch; or
            when `repeats` is below 1.
        UnsupportedBlockError: when the proof fails; the error names the block.

    Examples:
        >>> model = sd.models.CifarResNet(8)
        >>> handle = sd.apply(model)
        >>> print(sd.verify(model, torch.randn(2, 3, 8, 8)))
        blocks open  FLOPs  training step   time
        all          1.000       ... ms  1.000
        every other  0.708       ... ms  ...
        none         0.025       ... ms  ...
        3 blocks verified in 4 sets, largest difference 0
        ...
    """
    model = owner_of(model)
    applied = applied_to(model)
    refuse_sharded(model, "verify")
    refuse_nested(example)
    if repeats < 1:
        raise ApplyError(f"repeats={repeats}: at least one round must be timed")
    handle = applied.handle
    blocks = handle.blocks

    def forward(*args: Any, **kwargs: Any) -> Any:  # not the hooks of the model, which draw gates
        return model.forward(*args, **kwargs)

    step = caller(forward, example)
    proved = prove(
        model,
        example,
        applied.found,
        gate=handle.gate,
        scale=handle.scale,
        put_gates=lambda half: blocks,
        forward=forward,
        deadline=math.inf,
        drop_paths={},
    )
    every_other = [n % 2 == 0 and len(blocks) > 1 for n in range(len(blocks))]
    patterns = {
        "all": [True] * len(blocks),
        "every other": every_other,
        "none": [False] * len(blocks),
    }
    with preserve_state(model):
        model.train()
        steps = {name: _step(step, handle, gates) for name, gates in patterns.items()}
        flops = {name: _flops(one) for name, one in steps.items()}
        rounds = list(take_turns(steps, repeats, warmup=1))
    full = flops["all"] or 1
    seconds = {name: statistics.median(r[name] for r in rounds) for name in steps}
    return Verification(
        blocks=len(blocks),
        sets=proved.sets,
        difference=proved.difference,
        flops=(1.0, flops["every other"] / full, flops["none"] / full),
        seconds=(seconds["all"], seconds["every other"], seconds["none"]),
    )


def _step(run: Callable[[], Any], handle: Handle, gates: Sequence[bool]) -> Callable[[], None]:
    def step() -> None:
        with handle.forced(gates), torch.enable_grad():
            train_once(run)

    return step


def _flops(step: Callable[[], None]) -> int:
    with CountFlops() as counted:
        step()
    return counted.total
