"""Rewrite the methods of a model so that closed branches do not run."""
