"""Benchmarks: time and memory of training steps, in turns and in one process."""
