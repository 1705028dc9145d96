"""What a training step costs by each way of gating: time, FLOPs and memory."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from stochastic_depth.errors import ConfigError, first_line
from stochastic_depth.extras import require
from stochastic_depth.lab.bench.costs import COSTS, StepCost, costs_table, costs_to_json, step_costs
from stochastic_depth.lab.bench.results import clock
from stochastic_depth.lab.bench.workload import Step, Workload, timm_model, training_step
from stochastic_depth.lab.options import GatesOptions
from stochastic_depth.models import CifarResNet, VisionTransformer
from stochastic_depth.randomness import generator
from stochastic_depth.recipes.paper import gatings
from stochastic_depth.train.build import apply_survival
from stochastic_depth.train.config import Config, SurvivalConfig
from stochastic_depth.train.runtime import Runtime

BASE = "constant"
"""The gating that others are relative to: constant depth."""


class Logits(nn.Module):
    """A model of transformers that returns only its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).logits


def gating_steps(options: GatesOptions, runtime: Runtime, **arguments: Any) -> dict[str, Step]:
    """A training step of each gating, by autograd, on the same weights and inputs.

    Args:
        arguments: of the network, instead of its usual ones, if it is of timm or transformers.

    Raises:
        ConfigError: when there is no such network, or no layers named as in `options.lora`.
        MissingExtraError: without the library that the network comes from, or peft.
    """
    config = Config(survival=SurvivalConfig(final=options.final))
    steps: dict[str, Step] = {}
    for name in dict.fromkeys((BASE, *options.gatings)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, inputs, labels = build_network(options, runtime, **arguments)
            if options.lora:
                add_adapters(model, options.lora)
        example = inputs[:2] if "/" in options.network else None  # ours need none
        apply_survival(model, gatings(config)[name].survival, 0, options.repeats, example)
        steps[name] = training_step(model, inputs, labels, runtime)
    return steps


def build_network(
    options: GatesOptions, runtime: Runtime, **arguments: Any
) -> tuple[nn.Module, Tensor, Tensor]:
    """The network that `options` name, a batch of inputs for it, and their labels."""
    batch, size = options.batch, options.size
    library_name, _, name = options.network.partition("/")
    if library_name == "transformers":
        model = _language_model(name, arguments)
        vocabulary = model.config.vocab_size
        texts = torch.randint(vocabulary, (batch, size + 1), generator=generator("bench"))
        return Logits(model), texts[:, :-1], texts[:, 1:]
    if library_name == "timm":
        model = timm_model(name, size, **arguments)
    elif options.network == "vit":
        model = VisionTransformer(options.depth or 6)
    else:
        model = CifarResNet(options.depth or 110)
    images = Workload(batch, size, 3, runtime).images()
    return model, images, torch.arange(batch) % 10


def _language_model(kind: str, arguments: dict[str, Any]) -> Any:
    """A language model of transformers, without dropout, so that only gates differ."""
    transformers = require("transformers")
    try:
        config = transformers.AutoConfig.for_model(kind, use_cache=False, **arguments)
        rates = {n: 0.0 for n, v in vars(config).items() if "drop" in n and isinstance(v, float)}
        config.update(rates)
        return transformers.AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ConfigError(
            f"--network is transformers/{kind}, of which there is no language model: "
            f"{first_line(error)}"
        ) from error


def add_adapters(model: nn.Module, layers: tuple[str, ...], rank: int = 8) -> None:
    """Add adapters of peft to the layers of these names, and freeze everything else.

    Raises:
        ConfigError: when there are no such layers.
        MissingExtraError: without peft.
    """
    peft = require("peft")
    transposed = any(type(m).__name__ == "Conv1D" for m in model.modules())  # GPT-2's layers
    config = peft.LoraConfig(r=rank, target_modules=[*layers], fan_in_fan_out=transposed)
    try:
        peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        raise ConfigError(f"--lora is {' '.join(layers)}: {first_line(error)}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


@dataclass(frozen=True)
class GatesResult:
    """The costs of each gating."""

    costs: Mapping[str, StepCost]
    clock: str

    def to_json(self) -> dict[str, Any]:
        return {"clock": self.clock, "gatings": costs_to_json(self.costs, BASE)}


def measure(options: GatesOptions, runtime: Runtime, console: Console) -> GatesResult:
    """Take training steps of each gating; a schedule is passed through in `repeats` of them."""
    costs = step_costs(lambda: gating_steps(options, runtime), options.repeats, runtime, console)
    return GatesResult(costs, clock(runtime).__name__)


def tables(result: GatesResult, options: GatesOptions, runtime: Runtime) -> Iterator[Table | str]:
    adapters = ", LoRA" if options.lora else ""
    title = (
        f"{options.network}{adapters}, batch {options.batch}, size {options.size}, "
        f"p_L = {options.final:g}"
    )
    yield costs_table(title, result.costs, BASE, runtime)
    yield COSTS.format("constant depth")
