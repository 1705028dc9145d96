"""Begin a run, or open one to go on with it or to evaluate it."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import nn

from stochastic_depth.data import Batches, Share, batches
from stochastic_depth.distributed.world import on_primary, rank, ranks
from stochastic_depth.errors import CheckpointError
from stochastic_depth.train.config import Config
from stochastic_depth.train.execution import Execution, resolve_execution
from stochastic_depth.train.journal import best_record
from stochastic_depth.train.run import Run, create_run, open_run, refuse_existing
from stochastic_depth.train.training import Training


def begin(config: Config, path: Path) -> tuple[Run, Batches]:
    """Read the data, then make the run folder: a data set that is not there leaves no folder.

    Raises:
        ConfigError, DataError, RunError: when the configuration, the data or the folder is wrong.
    """
    on_primary(lambda: refuse_existing(path))
    execution = resolve_execution(config)
    images = open_batches(config, execution)
    Training(config, execution, images)  # a network that cannot be built leaves no folder either
    about = images.fingerprint, images.classes, images.shape
    return on_primary(lambda: create_run(path, config, execution, *about)), images


def reopen(path: Path, data_root: Path | None = None) -> tuple[Run, Batches]:
    """An existing run and its data, found under `data_root` where it has moved.

    Raises:
        ConfigError, DataError, RunError: as for `begin`; or the device of the run is not there, or
            the data is not what it began on.
    """
    run = on_primary(lambda: open_run(path))
    config = run.config
    if data_root is not None:
        config = replace(config, data=replace(config.data, root=data_root))
    now = resolve_execution(replace(config, device=run.execution.device))
    if ranks() > 1 and run.execution.engine == "graphs":
        run = replace(run, execution=replace(now, precision=run.execution.precision))
    images = open_batches(config, run.execution)
    run.require_data(images.fingerprint)
    return run, images


def open_batches(config: Config, execution: Execution) -> Batches:
    """The data of `config`, on the device it is trained on."""
    return batches(
        config.data.name,
        config.data.root,
        batch=config.optimizer.batch,
        seed=config.seed,
        device=execution.device,
        augment=config.data.augment,
        channels_last=True,
        validation=config.data.validation,
        train=config.data.train,
        size=config.data.size,
        download=config.data.download,
        workers=config.data.workers,
        share=Share(rank(), ranks()),
    )


def trained_model(
    run: Run, images: Batches, which: Literal["best", "last"] = "best"
) -> tuple[nn.Module, int]:
    """The network of a checkpoint in evaluation mode, its branches scaled by p_l, and its step.

    Args:
        which: "best" is the one of the lowest validation error.

    Raises:
        CheckpointError: when there is none, or it cannot be trusted.
    """
    records, steps = run.records(), run.checkpoints.steps()
    if not records or not steps:
        raise CheckpointError(f"{run.path} has no evaluated checkpoint yet")
    step = best_record(records).step if which == "best" else steps[0]
    training = Training(run.config, run.execution, images)
    training.load_state_dict(run.checkpoints.load(step, run.execution.device))
    return training.model.eval(), step
