"""Training runs: a configuration, a folder, and an iterator over what is measured."""

from stochastic_depth.train.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SurvivalConfig,
)
from stochastic_depth.train.fit import Interrupted, fit
from stochastic_depth.train.journal import Record, best_record
from stochastic_depth.train.run import Run, begin, open_run, reopen, trained_model

__all__ = [
    "Config",
    "DataConfig",
    "Interrupted",
    "ModelConfig",
    "OptimizerConfig",
    "Record",
    "Run",
    "SurvivalConfig",
    "begin",
    "best_record",
    "fit",
    "open_run",
    "reopen",
    "trained_model",
]
