"""Training runs: a configuration, a folder, and an iterator over what is measured."""

from stochastic_depth.lazy import lazily as _lazily

__getattr__, __dir__, __all__ = _lazily(__name__)
