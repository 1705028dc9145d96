"""Deep networks with stochastic depth: residual blocks that are really skipped while training.

    import stochastic_depth as sd

    depth = sd.apply(model, sd.LinearDecay(0.5))

Huang, Sun, Liu, Sedra and Weinberger, ECCV 2016, arXiv:1603.09382.
"""

from importlib.metadata import version

from stochastic_depth.errors import (
    ApplyError,
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    EngineError,
    ExportError,
    FoldError,
    GateError,
    MissingExtraError,
    RunError,
    StateError,
    StochasticDepthError,
    SurvivalError,
    TruncateError,
    UnsupportedBlockError,
)
from stochastic_depth.export import Dropped, drop_order
from stochastic_depth.export.fold import fold
from stochastic_depth.export.truncate import truncate
from stochastic_depth.gates import Gate, GateKind, Scale
from stochastic_depth.handle import Handle, SkippedPolicy
from stochastic_depth.migration import survival_rule
from stochastic_depth.residual import Residual, part, residual_step, scaled
from stochastic_depth.surgery import (
    BlockSummary,
    Plan,
    PlannedBlock,
    Summary,
    Verification,
    compile_blocks,
    handle_of,
    register_unit,
    remove,
)
from stochastic_depth.surgery.apply import apply
from stochastic_depth.surgery.plan import plan
from stochastic_depth.surgery.summary import summary
from stochastic_depth.surgery.verify import verify
from stochastic_depth.survival import LinearDecay, Ramp, Survival, SurvivalRule, Uniform

__version__ = version("stochastic-depth")

__all__ = [
    "ApplyError",
    "BlockSummary",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DivergedError",
    "Dropped",
    "EngineError",
    "ExportError",
    "FoldError",
    "Gate",
    "GateError",
    "GateKind",
    "Handle",
    "LinearDecay",
    "MissingExtraError",
    "Plan",
    "PlannedBlock",
    "Ramp",
    "Residual",
    "RunError",
    "Scale",
    "SkippedPolicy",
    "StateError",
    "StochasticDepthError",
    "Summary",
    "Survival",
    "SurvivalError",
    "SurvivalRule",
    "TruncateError",
    "Uniform",
    "UnsupportedBlockError",
    "Verification",
    "apply",
    "compile_blocks",
    "drop_order",
    "fold",
    "handle_of",
    "part",
    "plan",
    "register_unit",
    "remove",
    "residual_step",
    "scaled",
    "summary",
    "survival_rule",
    "truncate",
    "verify",
]
