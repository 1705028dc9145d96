"""Make the residual units of an existing model skippable, undo it, prove it."""

from stochastic_depth.surgery.apply import apply, remove

__all__ = ["apply", "remove"]
