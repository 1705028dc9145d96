"""Training runs: a configuration, a run folder, and an iterator over the records of a run."""

from stochastic_depth.lazy import lazily as _lazily

__getattr__, __dir__, __all__ = _lazily(__name__)
