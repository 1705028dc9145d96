"""A callback for Lightning's Trainer."""

from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from stochastic_depth.errors import ApplyError
from stochastic_depth.handle import Handle
from stochastic_depth.integrations import GatesPer, Settings, metrics
from stochastic_depth.survival import Survival


class StochasticDepth(pl.Callback):
    """Apply stochastic depth to the network of a LightningModule, log it, and resume it exactly.

        trainer = pl.Trainer(callbacks=[StochasticDepth(sd.LinearDecay(0.5))])

    It is applied before the Trainer wraps or shards the module, for training and for evaluation.
    The Trainer's checkpoints contain the state of the gates; a checkpoint with other probabilities
    is refused. Each training step logs the expected depth, the realised depth and the drop rate.
    In the epoch in which `StochasticWeightAveraging` estimates BatchNorm, every block runs.

    Args:
        survival: p_l, as `sd.apply` takes it. If the module calls `sd.apply` itself, in its
            constructor or in `configure_model`, leave it out, and the callback uses that handle.
        network: name of the attribute that holds the network; when not given, the only child that
            has parameters. A module of several networks takes one callback for each.
        example: an example of the network's input; the module's `example_input_array` when not
            given. A network of `sd.Residual` units needs none.
        gates_per: "step" runs all forward passes of an optimizer's step under the same gates, and a
            schedule counts these steps. "pass" draws gates in each forward pass.
        log: whether the metrics are logged; with `network`, its name precedes theirs.
        options: options of `sd.apply`: gate, scale, seed, ...
    """

    def __init__(
        self,
        survival: Survival | None = None,
        *,
        network: str | None = None,
        example: Any = None,
        gates_per: GatesPer = "step",
        log: bool = True,
        **options: Any,
    ) -> None:
        self.settings = Settings(survival, gates_per, options)
        self.network, self.example, self.log = network, example, log
        self._module: pl.LightningModule | None = None
        self._handle: Handle | None = None
        self._full_depth = ExitStack()

    @property
    def handle(self) -> Handle:
        """The handle that `sd.apply` returned.

        Raises:
            ApplyError: before the Trainer has set up the module.
        """
        if self._handle is None and self._module is not None:  # applied in `configure_model`
            self._handle = self.settings.taken_over(self._named(self._module), None)
        if self._handle is None:
            raise ApplyError(
                "there is no handle yet: stochastic depth is applied when the Trainer sets up the "
                "module, or by the module's own sd.apply in configure_model"
            )
        return self._handle

    @property
    def state_key(self) -> str:
        return self._generate_state_key(network=self.network)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._module = pl_module
        if is_overridden("configure_model", pl_module) and not self._is_built(pl_module):
            if self.settings.survival is not None or self.settings.options:
                raise ApplyError(
                    f"{type(pl_module).__name__} builds its network in configure_model, which runs "
                    "after the setup of callbacks: call sd.apply(network, ...) at the end of "
                    "configure_model, and give StochasticDepth no rule and no options of sd.apply"
                )
            self._handle = None
            return
        self._handle = self.settings.taken_over(self._named(pl_module), self._handle)
        if self._handle is None:
            example = pl_module.example_input_array if self.example is None else self.example
            self._handle = self.settings.apply(self._network_of(pl_module), example)

    def _is_built(self, module: pl.LightningModule) -> bool:
        if self.network is not None:
            return self.network in dict(module.named_modules())
        return next(module.parameters(), None) is not None

    def _named(self, module: pl.LightningModule) -> nn.Module:
        """The network that `network` names; the module itself if it is None."""
        if self.network is None:
            return module
        try:
            return module.get_submodule(self.network)
        except AttributeError:
            children = ", ".join(name for name, _ in module.named_children())
            raise ApplyError(
                f"network={self.network!r}: {type(module).__name__} has no such module; its "
                f"children are {children or 'none'}"
            ) from None

    def _network_of(self, module: pl.LightningModule) -> nn.Module:
        if self.network is not None:
            return self._named(module)
        children = {
            name: child
            for name, child in module.named_children()
            if next(child.parameters(), None) is not None
        }
        if len(children) != 1:
            raise ApplyError(
                f"{type(module).__name__} has {len(children)} children with parameters "
                f"({', '.join(children) or 'none'}): StochasticDepth(network=...) names the one"
            )
        return next(iter(children.values()))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        per_step = self.settings.gates_per == "step"
        self.handle.optimizer_steps = (lambda: trainer.global_step) if per_step else None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._handle is not None:
            self._handle.optimizer_steps = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if any(
            isinstance(each, StochasticWeightAveraging) and trainer.current_epoch > each.swa_end
            for each in trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        ):
            self._full_depth.enter_context(self.handle.full_depth())

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._full_depth.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._full_depth.close()
        self.on_train_end(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self.log:
            prefix = "" if self.network is None else f"{self.network}/"
            figures = metrics(self.handle)
            pl_module.log_dict({prefix + name: value for name, value in figures.items()})

    def state_dict(self) -> dict[str, Any]:
        return {} if self._handle is None else self._handle.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self.handle.load_state_dict(state_dict)
