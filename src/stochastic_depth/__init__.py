"""Deep networks with stochastic depth: residual blocks that are really skipped while training.

    import stochastic_depth as sd

    handle = sd.apply(model, sd.LinearDecay(0.5))

Names and submodules load when they are touched: `sd.distributed.gates_by_rank(model)` needs no
import of its own. Every error is in `sd.errors`; those that the functions here raise are here too.

Huang, Sun, Liu, Sedra and Weinberger, ECCV 2016, arXiv:1603.09382.
"""

from typing import TYPE_CHECKING, Any

from stochastic_depth.lazy import lazily as _lazily

if TYPE_CHECKING:
    __version__: str
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
    from stochastic_depth.foreign_rules import survival_rule
    from stochastic_depth.gates import Gate
    from stochastic_depth.handle import Handle
    from stochastic_depth.residual import Residual, residual_step
    from stochastic_depth.surgery.adapters import register_unit
    from stochastic_depth.surgery.apply import apply, handle_of, remove
    from stochastic_depth.surgery.compile import compile_blocks
    from stochastic_depth.surgery.inspect import plan, summary
    from stochastic_depth.surgery.verify import verify
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

_HOMES = {
    "errors": (
        "ApplyError",
        "FoldError",
        "GateError",
        "StochasticDepthError",
        "SurvivalError",
        "TruncateError",
        "UnsupportedBlockError",
    ),
    "export.fold": ("fold",),
    "export.truncate": ("drop_order", "truncate"),
    "gates": ("Gate",),
    "handle": ("Handle",),
    "foreign_rules": ("survival_rule",),
    "residual": ("Residual", "residual_step"),
    "surgery": (
        "apply",
        "compile_blocks",
        "handle_of",
        "plan",
        "register_unit",
        "remove",
        "summary",
        "verify",
    ),
    "survival": (
        "Decreasing",
        "Early",
        "Late",
        "LinearDecay",
        "Progressive",
        "Steps",
        "Uniform",
        "Warmup",
    ),
}
"""Where each name is imported from when it is first used."""

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

_find, __dir__ = _lazily(__name__, _HOMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("stochastic-depth")
    return _find(name)
