"""Prove that a model with gates is what it was: open, closed, in both modes, for each sample."""
