"""Open a run together with its data: begin it, reopen it, or load its trained network."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from stochastic_depth import data
from stochastic_depth.choices import CheckpointName
from stochastic_depth.data import Batches, Shard
from stochastic_depth.data.sources import SOURCES
from stochastic_depth.distributed.world import on_primary, rank, world_size
from stochastic_depth.errors import CheckpointError, ConfigError, DataError, RunError
from stochastic_depth.plain_text import command
from stochastic_depth.train.build import build_network, require_trainable
from stochastic_depth.train.checkpoint import as_checkpoint_error
from stochastic_depth.train.config import Config
from stochastic_depth.train.failures import failure_of
from stochastic_depth.train.journal import best_record
from stochastic_depth.train.run_folder import Run, create_run, open_run, refuse_existing
from stochastic_depth.train.runtime import Runtime, resolve_runtime, usable_device
from stochastic_depth.train.weights import read_weights, require_weights_of


def begin(config: Config, path: Path, fingerprint: str | None = None) -> tuple[Run, Batches]:
    """Read the data, then create the run folder; if the data is missing, no folder is created.

    Args:
        fingerprint: that of the data of the runs with which this one will be compared; any data is
            accepted when not given.

    Raises:
        ConfigError, DataError, RunError: when the configuration, the data or the folder cannot be
            used.
    """
    on_primary(lambda: refuse_existing(path))
    runtime = resolve_runtime(config)
    batches = open_batches(config, runtime)
    if fingerprint not in (None, batches.fingerprint):
        raise RunError(
            f"{path} belongs to runs on data with fingerprint {fingerprint[:12]}, this data has "
            f"{batches.fingerprint[:12]}: give the data they began on, or choose another --out"
        )
    require_trainable(config, batches)
    trained_on = batches.fingerprint, batches.classes, batches.shape
    return on_primary(lambda: create_run(path, config, runtime, *trained_on)), batches


def reopen(
    path: Path, data_root: Path | None = None, device: str | None = None
) -> tuple[Run, Batches]:
    """Open an existing run and its data.

    Args:
        data_root: where the data is now; where it was when not given.
        device: where to compute, in the precision of the run; on its device when not given.

    Raises:
        ConfigError, DataError, RunError: as `begin`; and when there is no such device, or the run
            began on different data.
    """
    run = on_primary(lambda: open_run(path))
    config = run.config
    if data_root is not None:
        config = replace(config, data=replace(config.data, root=data_root))
    root = config.data.root
    if root is not None and not Path(root).expanduser().exists():
        # A relative path is sought in the folder where one is now, not where the run began.
        sought = "" if Path(root).expanduser().is_absolute() else f" in {Path.cwd()}"
        raise DataError(
            f"{root}, the data of {path}, does not exist{sought}: give --data DIR (data_root, in "
            "Python), where it is now"
        )
    began = run.runtime
    if device is None:
        try:
            usable_device(began.device)
        except ConfigError as error:
            raise ConfigError(
                f"{error}. {path} began on {began.device}: add --device cpu to compute elsewhere, "
                f"or resume it by {command('train', '--resume', path, '--device', 'cpu')}"
            ) from error
    # The block program supports one process.
    needs_other_engine = began.engine == "program" and world_size() > 1
    now = resolve_runtime(
        replace(
            config,
            device=device or began.device,
            precision=began.precision,
            engine="auto" if needs_other_engine else config.engine,
        )
    )
    if needs_other_engine or now.device != began.device:
        run = replace(run, runtime=now)
    batches = open_batches(config, run.runtime)
    run.require_data(batches.fingerprint)
    return run, batches


def open_batches(config: Config, runtime: Runtime) -> Batches:
    """The data of `config`, on the device on which it is trained."""
    return data.batches(
        config.data.name,
        config.data.root,
        batch=config.optimizer.batch,
        seed=config.seed,
        device=runtime.device,
        augment=config.data.augment,
        validation=config.data.validation,
        train=config.data.train,
        size=config.data.size,
        download=config.data.download,
        workers=config.data.workers,
        shard=Shard(rank(), world_size()),
    )


def require_batches_of(run: Run, batches: Batches) -> None:
    """Refuse batches that are not those of a run, because their data or their settings differ.

    Raises:
        RunError: naming what differs, and both values.
    """
    run.require_data(batches.fingerprint)
    config, augment = run.config, run.config.data.augment
    if augment is None:
        augment = SOURCES[config.data.name].augmented
    for name, wanted, found in (
        ("optimizer.batch", config.optimizer.batch, batches.batch),
        ("seed", config.seed, batches.seed),
        ("data.augment", augment, batches.augment),
        ("shape of an image", run.shape, batches.shape),
        ("shard", Shard(rank(), world_size()), batches.shard),
    ):
        if found != wanted:
            raise RunError(
                f"the {name} of {run.path} is {wanted}, that of these batches is {found}: give the "
                "batches that begin or reopen returns with this run"
            )


def trained_model(
    run: Run, batches: Batches, which: CheckpointName = "best"
) -> tuple[nn.Module, int]:
    """The network of a checkpoint, in evaluation mode; and its step.

    If the last checkpoint of a finished run is missing, its final weights are the same network.

    Args:
        which: the checkpoint with the lowest validation error ("best"), or the newest ("last").

    Raises:
        CheckpointError: when there is no checkpoint, or it cannot be trusted.
        RunError: when the weights in the folder belong to another run, or are needed and damaged;
            and as `Run.is_finished`.
    """
    require_weights_of(run.id, run.weights)
    steps = _steps(run)
    step = steps[which]
    state = _state(run, steps, which)
    model, handle = build_network(run.config, run.runtime, batches)
    with as_checkpoint_error(step):
        model.load_state_dict(state["model"])
        if handle is not None and "handle" in state:
            handle.load_state_dict(state["handle"])
        elif handle is not None:
            handle.step = step
    return model.eval(), step


def _steps(run: Run) -> dict[CheckpointName, int]:
    """The steps of the best and of the newest checkpoint, or final weights.

    Raises:
        CheckpointError: when there is none.
        RunError: as `Run.is_finished`.
    """
    finished, records = run.is_finished(), run.records()
    newest = records[-1].step if finished else max(run.checkpoints.steps(), default=0)
    evaluated = [record for record in records if record.step <= newest]
    if len(records) > 1 and not newest:  # the first one is written before its checkpoint
        raise CheckpointError(
            f"{run.path} has no checkpoints left: put a copy of {run.checkpoints.folder} in its "
            "place, or train another run"
        )
    if not evaluated:
        if failure := failure_of(run.path):
            raise CheckpointError(
                f"{run.path} has no evaluated checkpoint, it failed: {failure}. Choose another run"
            )
        raise CheckpointError(
            f"{run.path} has no evaluated checkpoint yet: resume it by "
            f"{command('train', '--resume', run.path)}"
        )
    return {"best": best_record(evaluated).step, "last": newest}


def _state(run: Run, steps: dict[CheckpointName, int], which: CheckpointName) -> dict[str, Any]:
    """The state of a checkpoint; if it cannot be trusted, the error names the other one, if that
    can.

    Raises:
        CheckpointError, RunError: as `trained_model`.
    """
    try:
        return _load(run, steps, steps[which])
    except CheckpointError as error:
        remedy = "Put a copy in its place"
        other: CheckpointName = "last" if which == "best" else "best"
        if steps[other] != steps[which]:
            with suppress(RunError):
                _load(run, steps, steps[other])
                remedy += f', or use the {OTHERS[other]}: --checkpoint {other} (which="{other}", '
                remedy += "in Python)"
        raise CheckpointError(f"{error}. {remedy}") from error


OTHERS: dict[CheckpointName, str] = {"best": "best one", "last": "newest one"}


def _load(run: Run, steps: dict[CheckpointName, int], step: int) -> dict[str, Any]:
    """The checkpoint of `step`; the final weights if that of the last step is missing.

    Raises:
        CheckpointError, RunError: when it cannot be trusted.
    """
    if step == steps["last"] and step not in run.checkpoints.steps():
        return {"model": read_weights(run.weights, run.id)}
    return run.checkpoints.load(step, run.runtime.device)
