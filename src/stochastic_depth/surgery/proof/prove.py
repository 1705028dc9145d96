"""The proof of `sd.apply` and `sd.verify`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from stochastic_depth.block import Block
from stochastic_depth.choices import GateKind, Scale
from stochastic_depth.hooks import batch_size
from stochastic_depth.surgery.blocks import FoundBlock
from stochastic_depth.surgery.example import Example, caller, gradients_if_needed
from stochastic_depth.surgery.install import ungated
from stochastic_depth.surgery.proof.batch_dimension import check_samples
from stochastic_depth.surgery.proof.call_counts import calls_if_finite
from stochastic_depth.surgery.proof.evaluation import check_evaluation, untouched_outputs
from stochastic_depth.surgery.proof.gated import Gated
from stochastic_depth.surgery.proof.nonzero_weights import nonzero_weights
from stochastic_depth.surgery.proof.other_inputs import other_inputs
from stochastic_depth.surgery.proof.training import check_training


@dataclass(frozen=True)
class Proved:
    """Blocks with gates, and the results of their proof."""

    blocks: Sequence[Block]
    sets: int
    """How many sets of closed blocks were compared with the original model."""
    difference: float
    """The largest difference of outputs, relative to the largest output; nan on the meta device."""
    resets: dict[str, Any]
    """Attributes that branches set, by name of module and attribute, with their initial values."""


def prove(
    model: nn.Module,
    example: Example,
    found: Sequence[FoundBlock],
    *,
    gate: GateKind,
    scale: Scale,
    put_gates: Callable[[Example], Sequence[Block]],
    forward: Callable[..., Any],
    deadline: float,
    drop_paths: Mapping[nn.Module, FoundBlock],
) -> Proved:
    """Compare a model with gates with its original; `docs/design/architecture.md` lists the checks.

    Args:
        put_gates: puts the gates into `model`, or returns the blocks that have them already. Its
            argument is `example` with half of the samples; all of them with gate="batch".
        forward: calls `model` without the hooks that draw gates in training mode.
        deadline: a time of `time.monotonic()`, after which no further set of blocks is closed.
        drop_paths: those that were disabled, each with a block that has it.

    Raises:
        UnsupportedBlockError: when a block does not do what it should.
        ApplyError: when the model returns no tensor, or its first dimension is not the batch.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        with gradients_if_needed(model):
            return (forward if model.training else model)(*args, **kwargs)

    run = caller(call, example)
    batch = None if gate == "batch" else batch_size(example)
    usual = calls_if_finite(model, run)
    with nonzero_weights(model, run, usual):
        with ungated(model):
            half = example if batch is None else check_samples(model, example, found, batch)
            others = other_inputs(model, example, usual)
            untouched = untouched_outputs(model, run)
        other = run if others is example else caller(call, others)
        blocks = put_gates(half)
        gated = Gated(model, found, blocks, gate, scale, batch, run, other, drop_paths, deadline)
        sets, difference = check_evaluation(gated, untouched)
        resets = check_training(gated)
    return Proved(blocks, sets, difference, resets)
