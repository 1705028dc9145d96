"""Sweeps: a grid of runs in one folder, trained by any number of workers."""
