"""Make the residual units of an existing model skippable, undo it, prove it."""

from stochastic_depth.surgery.apply import apply, depth_of, remove
from stochastic_depth.surgery.summary import BlockSummary, Summary, summary

__all__ = ["BlockSummary", "Summary", "apply", "depth_of", "remove", "summary"]
