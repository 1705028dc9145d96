"""The laboratory: constant against stochastic depth, sweeps, benchmarks, analyses, and a report.

`experiments` groups runs, `outcomes` computes their results. A question has a file that computes
the answer and prints its table (`ensemble`), and one with its figure and its sentence
(`ensemble_chart`).
`report` collects the figures, `page` writes them; `charts`, `drawing`, `style`, `tables` and
`formatting` are used by all. Nothing in the library imports from here.
"""
