"""The laboratory: constant against stochastic depth, sweeps, benchmarks, analyses, and a report.

`study` puts runs together and says what they came to; every other file is a question of its own,
with what is computed, its chart and its sentence. Nothing in the library imports from here.
"""
