"""Published architectures of other libraries, without weights, with an example of their input."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.errors import ConfigError, first_line
from stochastic_depth.extras import require
from stochastic_depth.plain_text import count_text
from stochastic_depth.randomness import generator
from stochastic_depth.surgery.example import Example

Shape = Sequence[int]
"""Shape of one sample, without the batch dimension."""

TOKENS, SAMPLES = 16, 8000
"""The length of an example text in tokens, and of an example of speech in samples."""


def published(
    name: str,
    *,
    batch: int = 2,
    shape: Shape | None = None,
    device: str = "cpu",
    **options: Any,
) -> tuple[nn.Module, Example]:
    """A published model by its name, and a batch of random inputs for it.

    Args:
        name: "timm/resnet50", "torchvision/swin_t", "transformers/gpt2" (the type of a model),
            "transformers/path/to/config.json", or "package.module:factory", which names a function
            without arguments that returns a model, or a model and an example.
        batch: number of samples in the example.
        shape: shape of one sample, if it is not the published one.
        device: on "meta" only the structure is built.
        options: arguments of the functions of timm and torchvision that build the model, or fields
            of a configuration of transformers.

    Raises:
        ConfigError: when there is no such model, it needs a shape, or a factory is given options or
            returns something else. What a factory or its module raises is raised as it is.
        MissingExtraError: when its library is not installed.
    """
    origin, _, rest = name.partition("/")
    with torch.device(device) as on_device:
        if origin in LIBRARIES and rest:
            model, example = LIBRARIES[origin](rest, batch, shape, on_device, options)
        elif ":" in name:
            if options:
                raise ConfigError(
                    f"{name!r} is called without arguments, and cannot take {', '.join(options)}: "
                    "set them in the factory"
                )
            model, example = _from_factory(name, batch, shape)
        else:
            raise _no_model(name)
        return model, _with_mask(model, example) if device == "meta" else example


def _no_model(name: str) -> ConfigError:
    return ConfigError(
        f"{name!r} does not name a model: give timm/NAME, torchvision/NAME, transformers/TYPE or "
        "package.module:factory"
    )


def _timm(
    name: str, batch: int, shape: Shape | None, device: Any, options: dict[str, Any]
) -> tuple[nn.Module, Example]:
    timm = require("timm")
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    model = timm.create_model(name, **options)
    size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    return model, _floats(batch, shape or size, device)


def _torchvision(
    name: str, batch: int, shape: Shape | None, device: Any, options: dict[str, Any]
) -> tuple[nn.Module, Example]:
    models = require("torchvision.models")
    names = models.list_models()
    if name not in names:
        raise _unknown("torchvision", name, names)
    if name in models.list_models(module=models.detection):
        raise ConfigError(
            f"torchvision/{name} takes lists of images and targets: give package.module:factory, "
            "which returns the model and an example"
        )
    builder = models.get_model_builder(name)
    if "weights_backbone" in inspect.signature(builder).parameters:
        options = {"weights_backbone": None, **options}
    model = builder(**options)
    video = name in models.list_models(module=models.video)
    size = (3, 16, 112, 112) if video else (3, 224, 224)
    return model, _floats(batch, shape or size, device)


def _transformers(
    name: str, batch: int, shape: Shape | None, device: Any, options: dict[str, Any]
) -> tuple[nn.Module, Example]:
    transformers = require("transformers")
    types: list[str] = list(transformers.CONFIG_MAPPING.keys())
    if Path(name).suffix == ".json":
        if not Path(name).is_file():
            raise ConfigError(f"there is no configuration {name}: give the path of a config.json")
        fields = transformers.PretrainedConfig.get_config_dict(name)[0] | options
        config = transformers.AutoConfig.for_model(**fields)
    elif name in types:
        config = transformers.AutoConfig.for_model(name, **options)
    else:
        raise _unknown("transformers", name, types)
    try:
        model = transformers.AutoModel.from_config(config)
    except ValueError as error:
        raise ConfigError(
            f"transformers has no plain model of type {name}: {first_line(error)}"
        ) from error
    return model, inputs_of(model, batch, shape, device)


LIBRARIES: dict[str, Callable[..., tuple[nn.Module, Example]]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
}


def inputs_of(model: Any, batch: int, shape: Shape | None, device: Any) -> dict[str, Any]:
    """Example inputs of a transformers model, made from its main input and its configuration."""
    config, main = model.config, model.main_input_name
    inputs: dict[str, Any] = {}
    texts = getattr(config, "text_config", None) or config
    if main == "input_ids":
        length = shape or (TOKENS,)
        inputs[main] = _integers(batch, length, texts.vocab_size, device)
    elif main == "pixel_values":
        inputs[main] = _floats(batch, shape or _image(config), device)
    elif main == "input_features":
        length = 2 * getattr(config, "max_source_positions", 1500)
        inputs[main] = _floats(batch, shape or (config.num_mel_bins, length), device)
    elif main == "input_values":
        inputs[main] = _floats(batch, shape or (SAMPLES,), device)
    else:
        raise ConfigError(
            f"{type(model).__name__} takes {main}, for which no example input can be generated: "
            "give package.module:factory, which returns the model and an example"
        )
    if main == "input_ids" and getattr(config, "vision_config", None) is not None:
        inputs["pixel_values"] = _floats(batch, _image(config.vision_config), device)
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = _integers(batch, (TOKENS,), config.vocab_size, device)
    if hasattr(texts, "use_cache"):
        inputs["use_cache"] = False
    return inputs


def _image(config: Any) -> Shape:
    size = getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return getattr(config, "num_channels", 3), height, width


RETURNS = "return a model, or (model, example)"


def _from_factory(name: str, batch: int, shape: Shape | None) -> tuple[nn.Module, Example]:
    module, _, function = name.partition(":")
    module = module.removesuffix(".py").replace("/", ".")
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # it is found, and imports another one that is not
        raise ConfigError(
            f"{name!r} cannot be imported: {error}; give module:function, with a module that "
            "Python finds from this folder"
        ) from error
    if not hasattr(imported, function):
        raise ConfigError(
            f"{name!r} cannot be imported: {module} has no attribute {function!r}; give "
            "module:function, with a function of the module"
        )
    factory = getattr(imported, function)
    if isinstance(factory, nn.Module):
        raise ConfigError(f"{name!r} is a model: name a function that returns one")
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ConfigError(f"{name!r} cannot be called without arguments: {error}") from error
    except ValueError:
        pass  # some functions in C have no signature
    result = factory()
    if isinstance(result, tuple) and len(result) != 2:
        raise ConfigError(
            f"{name!r} returns {count_text(len(result), 'value')}: {RETURNS}, where "
            "example is a tuple if the model takes several inputs"
        )
    model, example = result if isinstance(result, tuple) else (result, None)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name!r} returns {type(model).__name__}, not a module: {RETURNS}")
    if shape is not None:
        example = _floats(batch, shape, torch.get_default_device())
    if example is None:
        raise ConfigError(
            f"{name!r} returns no example of its input: return (model, example), or give --shape"
        )
    return model, example


def _with_mask(model: Any, example: Example) -> Example:
    """`example`; with a complete attention mask if the model would have to read the values in it.

    Models of transformers read the positions of a text, to see whether several texts are packed
    into one, unless they are given a mask [batch, 1, length, length]. On the meta device there are
    no values to read.
    """
    inputs = {"input_ids": example} if isinstance(example, Tensor) else example
    if getattr(model, "main_input_name", None) != "input_ids" or not isinstance(inputs, dict):
        return example
    try:
        with torch.no_grad():
            model(**inputs)
    except RuntimeError as error:
        if "meta tensors" in str(error):
            batch, length = inputs["input_ids"].shape
            mask = torch.empty(batch, 1, length, length, device="meta")
            return {**inputs, "attention_mask": mask}
    return example


def _floats(batch: int, shape: Shape, device: Any) -> Tensor:
    if str(device) == "meta":
        return torch.empty(batch, *shape, device=device)
    return torch.randn(batch, *shape, generator=generator("example"), device="cpu").to(device)


def _integers(batch: int, shape: Shape, below: int, device: Any) -> Tensor:
    if str(device) == "meta":
        return torch.zeros(batch, *shape, dtype=torch.int64, device=device)
    numbers = torch.randint(below, (batch, *shape), generator=generator("example"), device="cpu")
    return numbers.to(device)


def _unknown(origin: str, name: str, known: Sequence[str]) -> ConfigError:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return ConfigError(f"{origin} has no model {name!r}{hint}")
