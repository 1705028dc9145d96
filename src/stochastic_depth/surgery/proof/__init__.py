"""Prove that a model with gates computes what it should: open, closed, in both modes, by sample."""
