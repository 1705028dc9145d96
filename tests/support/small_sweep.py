"""Six runs of six steps: an eight-layer network on some of the embedded digits."""

from dataclasses import replace

import optuna
from sqlalchemy import NullPool

from stochastic_depth.lab.sweep.folder import Grid
from stochastic_depth.recipes import RECIPES
from stochastic_depth.train import DataConfig, ModelConfig

GRID = Grid(rules=("linear", "constant"), survival=(0.3, 0.6), depths=(8,), seeds=(0, 1))
SMALL = replace(
    RECIPES["digits"](),
    data=DataConfig(train=300),
    model=ModelConfig(depth=8),
    epochs=2,
    evaluate_every=2,
)


def trials(sweep, url=None):
    """The record of a sweep, read with Optuna alone."""
    if url is None:
        storage = optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(sweep.folder / "queue.jsonl"))
        )
    else:
        storage = optuna.storages.RDBStorage(
            url.replace("postgresql", "postgresql+psycopg"), engine_kwargs={"poolclass": NullPool}
        )
    return optuna.load_study(study_name=sweep.study, storage=storage).trials
