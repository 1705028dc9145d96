"""What `sd.apply` would do to a model, without doing it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from stochastic_depth.surgery.apply import chosen_survival, put_gates, refuse_applied, take_gates
from stochastic_depth.surgery.find import (
    Choice,
    Example,
    Found,
    Granularity,
    caller,
    find_blocks,
    nothing_found,
)
from stochastic_depth.surgery.plain_table import plain_table, si
from stochastic_depth.surgery.proof import still_running
from stochastic_depth.survival import Survival


@dataclass(frozen=True)
class PlannedBlock:
    """One residual block, and how it would be made skippable."""

    name: str
    kind: str
    """The name of its class."""
    shortcut: str
    """"identity" or "projection"; both, with a comma, where its additions differ."""
    mechanism: str
    """"Residual": built to be skipped; "slice": its method is cut at the addition; "call": and so
    is the one that calls it, because the branch begins there; "registered": by
    `sd.register_unit`; "opaque": as a whole; "none": not at all, see `refusal`."""
    survival: float
    parameters: int
    """Of its branches."""
    flops: int
    """Of its branches in one forward pass on the example, 2 for each multiply-add."""
    refusal: str
    """Why it cannot be made skippable; empty where it can."""


@dataclass(frozen=True)
class Plan:
    """A model's residual blocks; printed, it is a table."""

    blocks: tuple[PlannedBlock, ...]

    @property
    def complete(self) -> bool:
        """Whether every block can be made skippable."""
        return not any(block.refusal for block in self.blocks)

    def __str__(self) -> str:
        head = ("block", "class", "shortcut", "mechanism", "p", "parameters", "FLOPs")
        rows = [
            (
                block.name,
                block.kind,
                block.shortcut,
                block.mechanism,
                f"{block.survival:.3f}",
                si(block.parameters),
                si(block.flops),
            )
            for block in self.blocks
        ]
        refused = [f"{b.name!r} ({b.kind}): {b.refusal}" for b in self.blocks if b.refusal]
        skippable = f"{len(self.blocks) - len(refused)} of {len(self.blocks)} blocks skippable"
        return "\n".join([plain_table(head, rows, left=4), skippable, *refused])


def plan(
    model: nn.Module,
    example: Example,
    survival: Survival | Literal["own"] | None = None,
    *,
    include: Choice | None = None,
    exclude: Choice = (),
    granularity: Granularity = "block",
    stacks: Sequence[str] = (),
) -> Plan:
    """A dry run of `sd.apply`, with the same arguments: `model` is not changed.

    Every block is found, cut and closed once on trial, and must call nothing of its branch then.
    Values are not compared, which is left to `sd.apply`: this works on the meta device too.

    Raises:
        ApplyError: when `model` has no residual block.
        SurvivalError: when a p_l is outside (0, 1].
    """
    refuse_applied(model)
    found = find_blocks(model, example, granularity, include, exclude, count_flops=True)
    if not found:
        raise nothing_found(model, example)
    found = _tried(model, example, found)
    p = chosen_survival(survival, found, stacks)
    return Plan(
        tuple(
            PlannedBlock(
                block.name,
                type(block.module).__name__,
                block.shortcut,
                block.mechanism,
                survival,
                sum(model.get_parameter(name).numel() for name in block.parameters),
                block.flops,
                block.refusal,
            )
            for block, survival in zip(found, p, strict=True)
        )
    )


def _tried(model: nn.Module, example: Example, found: list[Found]) -> list[Found]:
    """`found`, with the refusals that show when each block is closed."""
    cut = [block for block in found if not block.refusal]
    try:
        blocks = put_gates(cut, select=False)
        reasons = still_running(model, caller(model, example), cut, blocks)
    finally:
        take_gates(model)
    tried = iter(reasons)
    return [block if block.refusal else replace(block, refusal=next(tried)) for block in found]
