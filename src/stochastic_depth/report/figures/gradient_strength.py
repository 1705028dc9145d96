"""How strong the gradient is that reaches the first convolution: the paper's figure 7."""

import statistics

from stochastic_depth.report.experiment import Experiment, Series
from stochastic_depth.report.figure import Figure
from stochastic_depth.report.figures import curves
from stochastic_depth.report.figures.marks import keys


def gradient_strength(experiment: Experiment) -> Figure:
    """Against the epoch, of every run of an experiment."""
    panel = curves.panel(
        experiment,
        lambda record: record.gradient_mean,
        "",
        "mean absolute gradient",
        lambda gradient: f"{gradient:.3g}",
    )
    return Figure(
        id="gradient-strength",
        title="Gradient strength at the first convolution",
        sentence=_sentence(experiment.settled()),
        rows=curves.rows(experiment, {"gradient_mean": lambda record: record.gradient_mean}),
        panels=(panel,),
        legend=keys(experiment.series),
        note="Mean absolute gradient of the weights of the first convolution, which no gate skips, "
        "averaged over all steps of an epoch. Thin: each seed. Thick: their mean. Dotted: the "
        "learning rate is divided.",
    )


def _sentence(experiment: Experiment) -> str:
    if experiment.constant is None:
        told = ", ".join(f"{s.name} {_mean(s):.3g}" for s in experiment.series)
        return f"Averaged over training: {told}."
    base = _mean(experiment.constant)
    told = ", ".join(
        f"the gradient with {s.name} is {_mean(s) / base:.2f} times that with constant depth"
        for s in experiment.stochastic
    )
    return f"Averaged over training, {told or f'the gradient is {base:.3g}'}."


def _mean(series: Series) -> float:
    """The geometric mean over training and seeds: of ratios, as a logarithmic axis shows them."""
    values = [r.gradient_mean for run in series.runs for r in run.records if r.gradient_mean > 0]
    return statistics.geometric_mean(values) if values else 0.0
