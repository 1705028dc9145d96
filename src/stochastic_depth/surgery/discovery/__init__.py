"""Find the residual additions of a model: watch it, and say where to cut it."""
