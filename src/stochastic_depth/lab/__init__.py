"""The laboratory: constant against stochastic depth, sweeps, benchmarks, analyses, and a report.

`study` groups runs and computes their results; every other file is one question, with what is
computed, its chart and its sentence. Nothing in the library imports from here.
"""
