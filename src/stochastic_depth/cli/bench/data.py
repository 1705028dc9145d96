"""stochastic-depth bench data."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from stochastic_depth.cli.bench.options import Options
from stochastic_depth.cli.bench.output import milliseconds, shown, table_of, timings
from stochastic_depth.lab.bench.data import ORDER, augmented, data_and_steps, data_shares
from stochastic_depth.timing import take_turns
from stochastic_depth.train.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SurvivalConfig,
)
from stochastic_depth.train.runtime import Execution


@dataclass(frozen=True)
class Data(Options):
    """The share of a training step that is its data."""

    depth: int = 110
    """Of the CIFAR ResNet."""
    batch: int = 128
    """Images a step."""
    root: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of CIFAR-10 (none: generated images of its shape)."""

    def run(self, execution: Execution, console: Console) -> dict[str, Any]:
        data = DataConfig("cifar10", self.root)
        model, optimizer = ModelConfig(depth=self.depth), OptimizerConfig(batch=self.batch)
        constant = Config(
            data=data, model=model, survival=SurvivalConfig("constant"), optimizer=optimizer
        )
        configs = {
            "step, constant depth": constant,
            "step, p_L = 0.5": replace(constant, survival=SurvivalConfig("linear", 0.5)),
        }
        with console.status("reading the images"):
            images = augmented(constant, execution)
        steps = data_and_steps(configs, images, execution)
        rounds = list(shown(take_turns(steps, self.repeats), self.repeats, console))
        timed = timings(rounds)
        title = f"ResNet-{self.depth}, batch {self.batch}, {images.name} images"
        console.print(
            table_of(title, {n: t for n, t in timed.items() if n != ORDER}, self.batch),
            f"{ORDER}: {milliseconds(timed[ORDER].median)} ms, once in {images.steps_per_epoch} "
            "steps",
            highlight=False,
        )
        shares = data_shares(rounds, images.steps_per_epoch)
        for name, share in shares.items():
            low, high = share.quartiles
            console.print(
                f"data are {100 * share.median:.2f} % of a {name} "
                f"(quartiles {100 * low:.2f} to {100 * high:.2f})",
                highlight=False,
            )
        return {
            "images": images.name,
            "steps_per_epoch": images.steps_per_epoch,
            "seconds": {name: list(timing.seconds) for name, timing in timed.items()},
            "data_share": {name: share.median for name, share in shares.items()},
            "data_share_quartiles": {name: share.quartiles for name, share in shares.items()},
        }
