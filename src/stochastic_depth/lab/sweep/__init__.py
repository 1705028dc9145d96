"""Sweeps: independent runs over a grid, trained by any number of processes."""
