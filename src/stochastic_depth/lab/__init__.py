"""The laboratory: constant against stochastic depth, sweeps, benchmarks, analyses, and a report.

`outcomes` groups runs and computes their results. Every other file answers one question: it
computes the answer, and has its chart and its sentence. Nothing in the library imports from here.
"""
