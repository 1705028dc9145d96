"""Training loss and test error against the epoch: the paper's figure 3."""

from stochastic_depth.report.experiment import Experiment
from stochastic_depth.report.figure import Figure
from stochastic_depth.report.figures import curves
from stochastic_depth.report.figures.marks import keys
from stochastic_depth.report.measures import error_at_last
from stochastic_depth.report.wording import difference, percent, seeds


def training_curves(experiment: Experiment) -> Figure:
    """Of every run of an experiment."""
    panels = (
        curves.panel(
            experiment,
            lambda record: record.train_loss,
            "Training loss",
            "cross-entropy, nats",
            lambda loss: f"{loss:.4g}",
        ),
        curves.panel(
            experiment,
            lambda record: record.test_error,
            "Test error",
            "percent",
            lambda error: f"{error:.2f} %",
        ),
    )
    rows = curves.rows(
        experiment,
        {
            "train_loss": lambda record: record.train_loss,
            "validation_error": lambda record: record.validation_error,
            "test_error": lambda record: record.test_error,
            "learning_rate": lambda record: record.learning_rate,
        },
    )
    hidden = sum(not row["test_error"] for row in rows)
    return Figure(
        id="training-curves",
        title="Training loss and test error",
        sentence=_sentence(experiment),
        rows=rows,
        panels=panels,
        legend=keys(experiment.series),
        note="Thin: each seed. Thick: their mean. Dotted: the learning rate is divided."
        + f" {hidden} test errors of zero have no place on a logarithmic axis." * bool(hidden),
    )


def _sentence(experiment: Experiment) -> str:
    now = experiment.settled()
    errors = {series.name: error_at_last(series) for series in now.series}
    epoch = max(run.records[-1].epoch for run in now.runs)
    told = "; ".join(
        f"{series.name} {percent(errors[series.name])} ({seeds(len(series.runs))})"
        for series in now.series
    )
    sentence = f"Test error after epoch {epoch:g}: {told}."
    if now.constant is None or len(now.stochastic) != 1:
        return sentence
    constant, stochastic = now.constant, now.stochastic[0]
    apart = difference(errors[stochastic.name], errors[constant.name], stochastic, constant)
    return f"{sentence} {apart[0].upper()}{apart[1:]}."
