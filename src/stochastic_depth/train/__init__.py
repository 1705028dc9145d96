"""Training runs: a configuration, a folder, and an iterator over what is measured."""

from typing import TYPE_CHECKING

from stochastic_depth.lazy import lazily

if TYPE_CHECKING:
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

_HOMES = {
    "config": ("Config", "DataConfig", "ModelConfig", "OptimizerConfig", "SurvivalConfig"),
    "fit": ("Interrupted", "fit"),
    "journal": ("Record", "best_record"),
    "run": ("Run", "begin", "open_run", "reopen", "trained_model"),
}

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

__getattr__, __dir__ = lazily(__name__, _HOMES)
