"""Deep networks with stochastic depth: residual blocks that are really skipped while training.

    import stochastic_depth as sd

    handle = sd.apply(model, sd.LinearDecay(0.5))

`__init__.pyi` lists all names and where they are defined. Names and submodules load when they are
touched: `sd.distributed.gates_by_rank(model)` needs no import of its own. Every error is in
`sd.errors`.

Huang, Sun, Liu, Sedra and Weinberger, ECCV 2016, arXiv:1603.09382.
"""

from typing import Any

from stochastic_depth.lazy import lazily as _lazily

_find, __dir__, __all__ = _lazily(__name__)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("stochastic-depth")
    return _find(name)
