"""`sd.plan`: the blocks that `sd.apply` would make, before anything is changed."""

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import nn

from stochastic_depth.choices import Granularity
from stochastic_depth.gate_settings import require_choice
from stochastic_depth.plain_text import plain_table, si
from stochastic_depth.surgery.apply import asked_survival, survival_of_blocks
from stochastic_depth.surgery.blocks import FoundBlock, Mechanism
from stochastic_depth.surgery.example import Example, caller
from stochastic_depth.surgery.find.find_blocks import Found, find_blocks
from stochastic_depth.surgery.install import put_gates, take_gates
from stochastic_depth.surgery.make_skippable import Candidates
from stochastic_depth.surgery.proof.call_counts import still_running
from stochastic_depth.surgery.record.rejected import listed
from stochastic_depth.surgery.refuse import refuse
from stochastic_depth.surgery.select_modules import ModuleSelector, select_modules
from stochastic_depth.survival import Survival
from stochastic_depth.torch_private import uncompiled


@dataclass(frozen=True, kw_only=True)
class PlannedBlock:
    """One residual block, and how it would be made skippable."""

    name: str
    kind: str
    """The name of its class."""
    shortcut: str
    """"identity" or "projection"; "identity, projection" where its additions differ."""
    mechanism: Mechanism
    """"Residual": the block is built to be skipped. "slice": the method that adds is rewritten at
    the addition. "call": the method that calls it is rewritten too, because the branch begins
    there. "registered": its forward method comes from `sd.register_unit`. "deferred": nothing
    is rewritten, and the modules of the branch are not called. "none": the block cannot be skipped,
    see `refusal`."""
    survival: float
    parameters: int
    """The number of parameters of its branches."""
    flops: int
    """FLOPs of its branches in one forward pass on the example, counted as 2 per multiply-add."""
    refusal: str
    """The reason why it cannot be made skippable; empty if it can."""
    training_only: bool = False
    """Whether the model runs it in training mode only."""


PLAN_HEAD = ("block", "class", "shortcut", "mechanism", "p", "parameters", "FLOPs")


@dataclass(frozen=True)
class Plan:
    """The residual blocks of a model; printed, it is a table."""

    blocks: tuple[PlannedBlock, ...]
    rejected: tuple[str, ...] = ()
    """Additions that are not residual, one line for each: the module, the location, the reason."""

    @property
    def complete(self) -> bool:
        """Whether every block can be made skippable."""
        return not any(block.refusal for block in self.blocks)

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The rows of the table, one for each block, under `PLAN_HEAD`."""
        return [
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

    def __str__(self) -> str:
        refused = [f"{b.name!r} ({b.kind}): {b.refusal}" for b in self.blocks if b.refusal]
        skippable = f"{len(self.blocks) - len(refused)} of {len(self.blocks)} blocks skippable"
        only = [b.name for b in self.blocks if b.training_only]
        notes = [f"in training mode only: {', '.join(map(repr, only))}"] if only else []
        rejected = [f"not taken: {each}" for each in self.rejected]
        return "\n".join(
            [plain_table(PLAN_HEAD, self.rows, left=4), skippable, *notes, *refused, *rejected]
        )


@uncompiled()
def plan(
    model: nn.Module,
    example: Example,
    survival: Survival | Literal["own"] | None = None,
    *,
    drop_rate: float | None = None,
    include: ModuleSelector | None = None,
    exclude: ModuleSelector | None = (),
    granularity: Granularity = "block",
    stacks: str | Sequence[str] = (),
) -> Plan:
    """Show what `sd.apply` would do with these arguments and gate="batch"; `model` is not changed.

    Every block is made skippable, and closed once: then it must not call any module of its branch.
    Values are not compared, so this works on the meta device too. `sd.apply` may still refuse a
    block whose outputs are wrong, or that cannot run on some of the samples (gate="subset"). The
    arguments are those of `sd.apply`; the result, printed, is a table.

    Raises:
        ApplyError: as `sd.apply`.
        SurvivalError: when a p_l is outside (0, 1].

    Examples:
        >>> plan = sd.plan(sd.models.CifarResNet(8), torch.randn(1, 3, 32, 32))
        >>> print(plan)
        block     class     shortcut    mechanism      p  parameters   FLOPs
        blocks.0  Residual  identity    Residual   0.833      4.67 k  9.44 M
        blocks.1  Residual  projection  Residual   0.667        14 k  7.08 M
        blocks.2  Residual  projection  Residual   0.500      55.6 k  7.08 M
        3 of 3 blocks skippable
    """
    require_choice("granularity", granularity, get_args(Granularity))
    survival = asked_survival(survival, drop_rate)
    refuse(model, example)
    selected = select_modules(model, include, exclude)

    def find(defer: Container[str]) -> Found:
        return find_blocks(model, example, granularity, selected, defer=defer, count_flops=True)

    candidates = Candidates(find)
    found = _tried(model, example, candidates.found.blocks)
    while candidates.defer({block.name for block in found if block.refusal}):
        found = _tried(model, example, candidates.found.blocks)
    probabilities = survival_of_blocks(survival, model, found, stacks).at(0)
    return Plan(
        tuple(
            PlannedBlock(
                name=block.name,
                kind=type(block.module).__name__,
                shortcut=block.shortcut,
                mechanism=block.mechanism,
                survival=p,
                parameters=sum(model.get_parameter(name).numel() for name in block.parameters),
                flops=block.flops,
                refusal=block.refusal,
                training_only=block.training_only,
            )
            for block, p in zip(found, probabilities, strict=True)
        ),
        listed(candidates.found.rejected),
    )


def _tried(model: nn.Module, example: Example, found: Sequence[FoundBlock]) -> list[FoundBlock]:
    """`found`, with the reason for each block that cannot be closed without any other effect."""
    accepted = [block for block in found if not block.refusal]
    try:
        blocks = put_gates(model, accepted, select=False)
        reasons = still_running(model, caller(model, example), accepted, blocks)
    finally:
        take_gates(model)
    tried = iter(reasons)
    return [block if block.refusal else replace(block, refusal=next(tried)) for block in found]
