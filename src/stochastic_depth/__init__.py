"""Deep networks with stochastic depth: residual blocks that are really skipped while training.

    import stochastic_depth as sd

    handle = sd.apply(model, sd.LinearDecay(0.5))

Submodules load when they are touched: `sd.distributed.gates_by_rank(model)` needs no import of its
own. Every error is in `sd.errors`; those that the functions here raise are here too.

Huang, Sun, Liu, Sedra and Weinberger, ECCV 2016, arXiv:1603.09382.
"""

from importlib import import_module
from importlib.metadata import version
from pkgutil import iter_modules
from types import ModuleType

from stochastic_depth.errors import (
    ApplyError,
    FoldError,
    GateError,
    StochasticDepthError,
    SurvivalError,
    TruncateError,
    UnsupportedBlockError,
)
from stochastic_depth.export.fold import fold
from stochastic_depth.export.truncate import drop_order, truncate
from stochastic_depth.gates import Gate
from stochastic_depth.handle import Handle
from stochastic_depth.migration import survival_rule
from stochastic_depth.residual import Residual, residual_step
from stochastic_depth.surgery import (
    apply,
    compile_blocks,
    handle_of,
    plan,
    register_unit,
    remove,
    summary,
    verify,
)
from stochastic_depth.survival import (
    Decreasing,
    Early,
    Late,
    LinearDecay,
    Progressive,
    Steps,
    Uniform,
    Warmup,
)

__version__ = version("stochastic-depth")

__all__ = [
    "ApplyError",
    "Decreasing",
    "Early",
    "FoldError",
    "Gate",
    "GateError",
    "Handle",
    "Late",
    "LinearDecay",
    "Progressive",
    "Residual",
    "Steps",
    "StochasticDepthError",
    "SurvivalError",
    "TruncateError",
    "Uniform",
    "UnsupportedBlockError",
    "Warmup",
    "apply",
    "compile_blocks",
    "drop_order",
    "fold",
    "handle_of",
    "plan",
    "register_unit",
    "remove",
    "residual_step",
    "summary",
    "survival_rule",
    "truncate",
    "verify",
]


def __getattr__(name: str) -> ModuleType:
    """A submodule, imported when it is first asked for."""
    if name in _submodules():
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_submodules()})


def _submodules() -> set[str]:
    return {module.name for module in iter_modules(__path__) if not module.name.startswith("_")}
