"""Sweeps: many independent runs over a grid, by as many processes as one likes."""
