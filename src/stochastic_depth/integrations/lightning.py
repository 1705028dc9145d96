"""A callback for Lightning's Trainer."""

from typing import Any

import lightning.pytorch as pl
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

    Args:
        survival: p_l, as `sd.apply` takes it. If stochastic depth is already applied in the
            module's constructor, leave it out, and the callback uses the handle from there.
        network: name of the attribute that holds the network; when not given, the only child that
            has parameters.
        example: an example of the network's input; the module's `example_input_array` when not
            given. A network of `sd.Residual` units needs none.
        gates_per: "step" runs all micro-batches of an optimizer's step under the same gates, and a
            schedule counts these steps. "pass" draws gates in each forward pass.
        log: whether the metrics are logged.
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
        self._handle: Handle | None = None

    @property
    def handle(self) -> Handle:
        """The handle that `sd.apply` returned.

        Raises:
            ApplyError: before the Trainer has set up the module.
        """
        if self._handle is None:
            raise ApplyError(
                "there is no handle yet: stochastic depth is applied when the Trainer sets up the "
                "module"
            )
        return self._handle

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        named = pl_module if self.network is None else pl_module.get_submodule(self.network)
        self._handle = self.settings.taken_over(named, self._handle)
        if self._handle is None:
            example = pl_module.example_input_array if self.example is None else self.example
            self._handle = self.settings.apply(self._network_of(pl_module), example)

    def _network_of(self, module: pl.LightningModule) -> nn.Module:
        if self.network is not None:
            return module.get_submodule(self.network)
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

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.settings.gates_per == "step":
            self.handle.step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self.log:
            pl_module.log_dict(metrics(self.handle))

    def state_dict(self) -> dict[str, Any]:
        return {} if self._handle is None else self._handle.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self.handle.load_state_dict(state_dict)
