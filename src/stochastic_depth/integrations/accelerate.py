"""Let gates follow the optimizer's steps, and save and restore them with accelerate's states."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.hooks import RemovableHandle

from stochastic_depth.errors import ApplyError, CheckpointError
from stochastic_depth.files import write_whole
from stochastic_depth.handle import Handle
from stochastic_depth.surgery import handle_of
from stochastic_depth.surgery.applied import applied_inside

FILE = "stochastic_depth.json"
"""The file in the folder of `accelerator.save_state`; further models have a number in its name."""


def follow(accelerator: Accelerator, model: nn.Module, optimizer: Any) -> Handle:
    """Let the gates of a prepared model follow the steps of its optimizer.

        handle = sd.apply(model)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        follow(accelerator, model, optimizer)

    All micro-batches of a step then run under the same gates, whatever the accumulation. The count
    begins at `handle.step`. Call it again for another optimizer, or after setting `handle.step`: it
    replaces the earlier call. A copy of the model is not followed.

    `save_state` and `load_state` write and read the state of the gates, in a JSON file of its own.
    If there are several models, prepare them in the same order when a run is resumed.

    Args:
        model: a model with stochastic depth, as `accelerator.prepare` returned it.
        optimizer: the optimizer whose steps count, prepared or not.

    Returns:
        The handle that `sd.apply` returned.

    Raises:
        ApplyError: when stochastic depth is not applied to `model`, or to several modules in it, or
            the accelerator has not prepared it.
    """
    inside = applied_inside(model)
    if not inside:
        raise ApplyError(
            f"{type(model).__name__} has no stochastic depth: sd.apply(model) before "
            "accelerator.prepare"
        )
    if len(inside) > 1:
        raise ApplyError(
            f"stochastic depth is applied to several modules inside {type(model).__name__} "
            f"({', '.join(map(repr, inside))}): call follow for each of them"
        )
    (applied,) = inside.values()
    handle = handle_of(applied)
    steps = _Steps(accelerator, handle)
    if steps.file() is None:
        raise ApplyError(
            f"{type(model).__name__} was not prepared by this accelerator: "
            "model, optimizer = accelerator.prepare(model, optimizer) first"
        )
    if isinstance(handle.optimizer_steps, _Steps):
        handle.optimizer_steps.remove()
    steps.follow(getattr(optimizer, "optimizer", optimizer))
    return handle


class _Steps:
    """The count of an optimizer's steps, which the gates of one model follow."""

    def __init__(self, accelerator: Accelerator, handle: Handle) -> None:
        self._accelerator = accelerator
        self.handle, self.done = handle, handle.step
        self._hooks: list[RemovableHandle] = []

    def __call__(self) -> int:
        return self.done

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        self.handle.optimizer_steps = self
        self._hooks = [
            optimizer.register_step_post_hook(self.after_step),
            self._accelerator.register_save_state_pre_hook(self.save),
            self._accelerator.register_load_state_pre_hook(self.load),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def file(self) -> str | None:
        """The name of its file, by its place among the models of the accelerator; None if it is no
        model of it any more, after `accelerator.free_memory`."""
        models = self._accelerator._models
        applied = (each for model in models for each in applied_inside(model).values())
        for number, each in enumerate(applied, 1):
            if handle_of(each) is self.handle:
                return FILE if number == 1 else f"{Path(FILE).stem}_{number}.json"
        return None

    def remove_if_replaced(self) -> bool:
        """Remove the hooks if the gates follow something else now; returns whether they do."""
        if self.handle.optimizer_steps is self:
            return False
        self.remove()
        return True

    def after_step(self, *_: object) -> None:
        if not self.remove_if_replaced():
            self.done += 1

    def save(self, models: list[nn.Module], weights: list[Any], folder: str) -> None:
        accelerator, name = self._accelerator, self.file()
        if name is None or self.remove_if_replaced():
            return
        on_each_node = accelerator.project_configuration.save_on_each_node
        if accelerator.is_local_main_process if on_each_node else accelerator.is_main_process:
            state = {**self.handle.state_dict(), "step": self.done}
            write_whole(Path(folder) / name, json.dumps(state).encode())

    def load(self, models: list[nn.Module], folder: str) -> None:
        if (name := self.file()) is None or self.remove_if_replaced():
            return
        file = Path(folder) / name
        if not file.is_file():
            raise CheckpointError(
                f"{file} is missing: {folder} was saved without the gates of this model"
            )
        try:
            state = json.loads(file.read_text())
        except ValueError as error:
            raise CheckpointError(f"{file} is damaged: {error}") from error
        self.handle.load_state_dict(state)
        self.done = self.handle.step
