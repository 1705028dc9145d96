"""What skipped blocks and forward-only blocks save at equal gates, with or without adapters."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from stochastic_depth.extras import require
from stochastic_depth.lab.bench.costs import COSTS, StepCost, costs_table, costs_to_json, step_costs
from stochastic_depth.lab.bench.results import clock
from stochastic_depth.lab.bench.workload import Step, Workload, training_step
from stochastic_depth.lab.options import ClosedOptions
from stochastic_depth.lab.outcomes import CONSTANT
from stochastic_depth.randomness import generator
from stochastic_depth.surgery import apply
from stochastic_depth.survival import LinearDecay
from stochastic_depth.train.runtime import Runtime

SKIPPED, FORWARD_ONLY = "skipped", "forward-only"
ADAPTED = {
    "vit-small": ["qkv", "proj", "fc1", "fc2"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
"""The layers of each network that get adapters."""


class Logits(nn.Module):
    """A model of transformers that returns only its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).logits


def adapt(model: nn.Module, targets: list[str], rank: int = 8) -> None:
    """Add adapters to the named layers, and freeze everything else.

    Raises:
        MissingExtraError: without peft.
    """
    peft = require("peft")
    transposed = any(type(m).__name__ == "Conv1D" for m in model.modules())  # GPT-2's layers
    config = peft.LoraConfig(r=rank, target_modules=targets, fan_in_fan_out=transposed)
    with torch.random.fork_rng():
        peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def closed_steps(
    options: ClosedOptions, runtime: Runtime, build: Mapping[str, Any] | None = None
) -> dict[str, Step]:
    """A training step of each alternative, on the same weights, inputs and gates.

    Args:
        build: arguments of the network that replace its usual ones; for tests.

    Raises:
        MissingExtraError: without the library that the network comes from, or peft.
    """
    steps: dict[str, Step] = {}
    for name in (CONSTANT, SKIPPED, FORWARD_ONLY):
        model, inputs, labels = _network(options, build or {}, runtime)
        if options.lora:
            adapt(model, ADAPTED[options.network])
        if name != CONSTANT:
            closed = "skipped" if name == SKIPPED else "forward-only"
            scale = "training" if name == SKIPPED else None
            apply(
                model,
                LinearDecay(options.final),
                example=inputs[:2],
                closed=closed,
                scale=scale,
                skipped="freeze",
            )
        steps[name] = training_step(model, inputs, labels, runtime)
    return steps


def _network(
    options: ClosedOptions, build: Mapping[str, Any], runtime: Runtime
) -> tuple[nn.Module, Tensor, Tensor]:
    """timm's ViT-S/16 or transformers' GPT-2, always with the same weights; inputs and labels."""
    batch, size = options.batch, options.size
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if options.network == "vit-small":
            arguments = {"num_classes": 10, "img_size": size, **build}
            model = require("timm").create_model("vit_small_patch16_224", **arguments)
            images = Workload(batch, size, 3, runtime).images()
            return model, images, torch.arange(batch) % 10
        hf = require("transformers")
        without = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
        config = hf.GPT2Config(**{**without, **build})
        texts = torch.randint(config.vocab_size, (batch, size + 1), generator=generator("bench"))
        return Logits(hf.GPT2LMHeadModel(config)), texts[:, :-1], texts[:, 1:]


@dataclass(frozen=True)
class ClosedResult:
    """The costs of each alternative."""

    costs: Mapping[str, StepCost]
    clock: str

    def to_json(self) -> dict[str, Any]:
        return {"clock": self.clock, "alternatives": costs_to_json(self.costs, CONSTANT)}


def measure(options: ClosedOptions, runtime: Runtime, console: Console) -> ClosedResult:
    """Compare skipped and forward-only blocks with constant depth."""
    costs = step_costs(lambda: closed_steps(options, runtime), options.repeats, runtime, console)
    return ClosedResult(costs, clock(runtime).__name__)


def tables(result: ClosedResult, options: ClosedOptions, runtime: Runtime) -> Iterator[Table | str]:
    adapters = ", LoRA" if options.lora else ""
    unit = "images" if options.network == "vit-small" else "texts"
    title = (
        f"{options.network}{adapters}, {options.batch} {unit} of {options.size}, "
        f"p_L = {options.final:g}"
    )
    yield costs_table(title, result.costs, CONSTANT, runtime)
    yield COSTS.format(CONSTANT)
