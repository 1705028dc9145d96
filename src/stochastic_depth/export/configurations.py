"""The configurations of transformers models from which layers were removed."""

import copy
from typing import Any

import torch
from torch import nn

from stochastic_depth.errors import TruncateError, first_line
from stochastic_depth.surgery.example import Example, caller
from stochastic_depth.surgery.model_state import preserve_state
from stochastic_depth.tensors import copied, largest_difference, tensors_in

SAME = 1e-6
"""Relative tolerance for outputs that the same operations compute from the same weights."""
_COUNTS = "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers"
_COUNTS_OF_DECODERS = "decoder_layers", "num_decoder_layers"
_LAYERS_BY_NUMBER = "mlp_only_layers", "moe_layers"


def update_configurations(model: nn.Module, name: str, before: int, kept: list[int]) -> None:
    """Update the configurations of transformers above the list `name`, from which `kept` remain.

    Args:
        before: the length of the list before.
    """
    path = name.split(".")
    for length in range(len(path) + 1):
        above: Any = model.get_submodule(".".join(path[:length]))
        config = getattr(above, "config", None)
        if hasattr(above, "save_pretrained") and config is not None:
            changed = copy.deepcopy(config)  # other models may have the same one
            _count_layers(changed, path, before, kept)
            for module in model.modules():
                if getattr(module, "config", None) is config:
                    module.config = changed


def _count_layers(config: Any, path: list[str], before: int, kept: list[int]) -> None:
    depths = getattr(config, "depths", None)
    stages = [int(part) for part in path if part.isdigit()]
    if isinstance(depths, list | tuple) and stages:
        config.depths = [len(kept) if n == stages[0] else depth for n, depth in enumerate(depths)]
        return
    both = bool(getattr(config, "is_encoder_decoder", False))
    for count in _COUNTS_OF_DECODERS if both and "decoder" in path else _COUNTS:
        if getattr(config, count, None) == before:
            setattr(config, count, len(kept))
    for setting, value in list(vars(config).items()):
        if setting in _LAYERS_BY_NUMBER and value is not None:
            setattr(config, setting, [kept.index(number) for number in value if number in kept])
        elif isinstance(value, list | tuple) and len(value) == before and not both:
            setattr(config, setting, [value[number] for number in kept])


def check_configuration(twin: nn.Module, example: Example) -> None:
    """Build the transformers models inside `twin` from their configurations, as loading them does.

    Raises:
        TruncateError: when a configuration cannot describe what is left of its model.
    """
    pretrained = [
        (name, module)
        for name, module in twin.named_modules()
        if hasattr(module, "save_pretrained") and hasattr(module, "config")
    ]
    outermost = [
        (name, module)
        for name, module in pretrained
        if not any(name != n and (not n or name.startswith(f"{n}.")) for n, _ in pretrained)
    ]
    for name, module in outermost:
        try:
            with torch.random.fork_rng(devices=[]):
                built = type(module)(copy.deepcopy(module.config))
            built.load_state_dict(module.state_dict())
            built = built.to(next(module.parameters()))
            rebuilt = built
            if name:
                rebuilt = copied(twin)
                rebuilt.set_submodule(name, built)
            with preserve_state(rebuilt), preserve_state(twin), torch.no_grad():
                given = tensors_in(caller(twin.eval(), example)())
                difference = largest_difference(
                    given, tensors_in(caller(rebuilt.eval(), example)())
                )
            why = "" if difference <= SAME else f"its outputs differ by {difference:.2g}"
        except Exception as error:
            why = f"{type(error).__name__}: {first_line(error)}"
        if why:
            raise TruncateError(
                f"{type(module).__name__}: its config cannot describe which layers are left, so "
                f"saving and loading would change the network ({why}): keep other blocks, for "
                "example the first of each stage (keep=N)"
            )
