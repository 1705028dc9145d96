"""A callback for transformers' Trainer."""

from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

import transformers as hf
from transformers.trainer_callback import ExportableState

from stochastic_depth.errors import ApplyError, CheckpointError
from stochastic_depth.handle import Handle
from stochastic_depth.integrations import GatesPer, Settings, metrics
from stochastic_depth.models.published import inputs_of
from stochastic_depth.surgery.applied import applied_inside
from stochastic_depth.survival import Survival


class StochasticDepthCallback(hf.TrainerCallback, ExportableState):
    """Apply stochastic depth to the Trainer's model, log it, and resume it exactly.

        trainer = hf.Trainer(model, arguments, train_dataset=data,
                             callbacks=[StochasticDepthCallback(sd.LinearDecay(0.5))])

    It is applied when the Trainer is constructed, before the model is wrapped for several
    processes. The model's cache of keys and values is switched off, as the Trainer does too. Gates
    follow the Trainer's count of steps, which its checkpoints contain; with
    `load_best_model_at_end` they are those of the best checkpoint afterwards. Each log gets the
    expected depth, the realised depth and the drop rate.

    Args:
        survival: p_l, as `sd.apply` takes it. If stochastic depth is already applied, leave it out,
            and the callback uses the existing handle.
        example: the keyword arguments of one call of the model; when not given, they are made from
            the model's configuration.
        gates_per: "step" runs all forward passes of an optimizer's step under the same gates, and a
            schedule counts these steps. "pass" draws gates in each forward pass.
        log: whether the metrics are added to the Trainer's logs.
        options: options of `sd.apply`: gate, scale, seed, ...
    """

    def __init__(
        self,
        survival: Survival | None = None,
        *,
        example: dict[str, Any] | None = None,
        gates_per: GatesPer = "step",
        log: bool = True,
        **options: Any,
    ) -> None:
        self.settings = Settings(survival, gates_per, options)
        self.example, self.log = example, log
        self._handle: Handle | None = None

    @property
    def handle(self) -> Handle:
        """The handle that `sd.apply` returned.

        Raises:
            ApplyError: before a Trainer was constructed with this callback.
        """
        if self._handle is None:
            raise ApplyError("there is no handle yet: make a Trainer with this callback first")
        return self._handle

    def on_init_end(self, args, state, control, model: Any = None, **kwargs) -> None:
        self._apply(model)

    def on_train_begin(self, args, state, control, model: Any = None, **kwargs) -> None:
        if not applied_inside(model) and args.world_size > 1:
            # `model_init` has returned another model, which is already wrapped.
            raise ApplyError("many processes with model_init=: call sd.apply in model_init itself")
        self._apply(model)
        if state.global_step > 0:  # else its callbacks may be of the model before `model_init`
            self._restore(state)
        per_step = self.settings.gates_per == "step"
        self.handle.optimizer_steps = (lambda: state.global_step) if per_step else None

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.handle.optimizer_steps = None
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            with suppress(CheckpointError):  # the Trainer warns of a missing folder, and goes on
                self.load_checkpoint(state.best_model_checkpoint)

    def load_checkpoint(self, folder: str | PathLike[str]) -> None:
        """Restore the state of the gates from a checkpoint folder of the Trainer.

        To evaluate the model of a folder in a new Trainer, whose evaluation reads no checkpoint:

            callback.load_checkpoint(folder)
            trainer.evaluate()

        Under a schedule, p_l of the evaluation depends on the step that the folder contains.

        Raises:
            ApplyError: before a Trainer was constructed with this callback.
            CheckpointError: when the folder has no state of gates.
            StateError: when it was saved under different survival probabilities, gates or scaling.
        """
        file = Path(folder) / "trainer_state.json"
        if not file.is_file():
            raise CheckpointError(
                f"{file} is missing: give a folder checkpoint-<step> that a Trainer has saved"
            )
        if not self._restore(hf.TrainerState.load_from_json(str(file))):
            raise CheckpointError(f"{file} was saved without {type(self).__name__}")

    def _restore(self, state: hf.TrainerState) -> bool:
        """Restore the gates from the state of a Trainer; returns whether it contains them."""
        callbacks: Any = state.stateful_callbacks or {}  # by name, unlike its annotation
        exported = callbacks.get(type(self).__name__)
        saved = exported["attributes"].get("saved") if isinstance(exported, dict) else None
        if saved:
            self.handle.load_state_dict(saved)
        return bool(saved)

    def _apply(self, model: Any) -> None:
        self._handle = self.settings.taken_over(model, self._handle)
        if self._handle is None:
            for part in model.modules():  # the decoder of T5 has a config of its own
                config: Any = getattr(part, "config", None)
                if getattr(config, "use_cache", False):
                    config.use_cache = False
            device = next(model.parameters()).device
            self._handle = self.settings.apply(
                model, self.example or inputs_of(model, 2, None, device)
            )

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.log and logs is not None and "loss" in logs:
            figures = metrics(self.handle)
            logs.update(figures)
            state.log_history[-1].update(figures)

    def state(self) -> dict[str, Any]:
        """The state of this callback that the Trainer's checkpoints contain."""
        saved = None if self._handle is None else self._handle.state_dict()
        arguments = {"gates_per": self.settings.gates_per, "log": self.log}
        return {"args": arguments, "attributes": {"saved": saved}}
