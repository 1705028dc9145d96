"""Record one forward pass and find its residual additions."""
