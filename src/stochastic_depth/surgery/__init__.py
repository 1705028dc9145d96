"""Make the residual units of an existing model skippable, undo it, prove it."""

from stochastic_depth.surgery import adapters as adapters
from stochastic_depth.surgery.adapters import register_unit
from stochastic_depth.surgery.apply import apply, handle_of, remove
from stochastic_depth.surgery.compile import compile_blocks
from stochastic_depth.surgery.inspect import (
    BlockSummary,
    Plan,
    PlannedBlock,
    Summary,
    plan,
    summary,
)
from stochastic_depth.surgery.verify import Verification, verify

__all__ = [
    "BlockSummary",
    "Plan",
    "PlannedBlock",
    "Summary",
    "Verification",
    "apply",
    "compile_blocks",
    "handle_of",
    "plan",
    "register_unit",
    "remove",
    "summary",
    "verify",
]
