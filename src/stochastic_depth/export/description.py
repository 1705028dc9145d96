"""The description in an exported file: how to build the network, and how it was measured."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, get_args

from torch import nn

from stochastic_depth.choices import Scaling
from stochastic_depth.errors import ConfigError, ExportError
from stochastic_depth.export.remove_blocks import remove_blocks
from stochastic_depth.models.networks import NETWORKS

FORMAT = 1
KEY = "stochastic_depth"
"""The key of the description in the metadata of a file."""
CHECKSUM = "sha256"
"""The key of the checksum of the tensors and of all other metadata."""
CLASSES = {network.__name__: network for network in NETWORKS.values()}


@dataclass(frozen=True)
class Architecture:
    """One of the networks of this library, and which of its blocks were removed."""

    kind: str
    """The name of the class in `stochastic_depth.models`."""
    arguments: dict[str, Any]
    """The arguments of the class."""
    removed: tuple[int, ...] = ()
    """Positions of the blocks that were replaced by their shortcut, from 0."""

    def build(self, tensors: int) -> nn.Module:
        """Build the network, with initial weights.

        Args:
            tensors: the number of tensors in the file; a network that needs more is not built.

        Raises:
            ExportError: when there is no such network.
        """
        if self.kind not in CLASSES:
            raise ExportError(f"there is no network {self.kind!r}: {', '.join(CLASSES)} are known")
        depth = self.arguments.get("depth", 0)
        if not isinstance(depth, int) or depth > tensors + 3 * len(self.removed):
            raise ExportError(f"a network of depth {depth!r} has more than {tensors} tensors")
        try:
            model = CLASSES[self.kind](**self.arguments)
            remove_blocks(model, self.removed)
        except (ConfigError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise ExportError(f"{self.kind} cannot be built: {error}") from error
        return model


def blocks_at(depth: float, blocks: int) -> int:
    """How many of `blocks` blocks run at `depth`, the fraction that runs; at least one."""
    return max(1, round(depth * blocks))


@dataclass(frozen=True)
class ImageInput:
    """How a picture is converted to the input of the network."""

    shape: tuple[int, int, int]
    """Channels, height and width."""
    shorter_side: int
    """Pixels of the shorter side, to which a picture is scaled before its middle is cut out."""
    mean: tuple[float, ...]
    """Mean of each channel, for values from 0 to 1; it is subtracted."""
    std: tuple[float, ...]
    """Standard deviation of each channel; the difference is divided by it."""
    scaling: Scaling = "bilinear"
    """How a picture is scaled; older files do not say so."""


@dataclass(frozen=True)
class DepthChoice:
    """Error and cost of the network at one depth, measured when it was exported."""

    blocks: int
    """The number of blocks that run."""
    validation_error: float
    """Percent; nan where there are no validation images."""
    test_error: float
    """Percent."""
    parameters: int
    """The number of parameters."""
    flops: int
    """FLOPs of one image, 2 for each multiply-add."""
    seconds: float
    """Seconds per image in a batch, the median."""


@dataclass(frozen=True)
class Description:
    """Everything in a file besides the weights."""

    architecture: Architecture
    input: ImageInput
    classes: tuple[str, ...]
    survival: dict[str, Any] = field(default_factory=dict)
    """The survival configuration of the training run; p_l is already in the weights."""
    source: dict[str, Any] = field(default_factory=dict)
    """The run and checkpoint it comes from, and the errors in percent; None if the run was stopped
    there, between two evaluations."""
    versions: dict[str, str] = field(default_factory=dict)
    order: tuple[int, ...] = ()
    """Positions of all blocks, the least needed first; empty where the depth is fixed."""
    choices: tuple[DepthChoice, ...] = ()

    def choice_at(self, depth: float) -> DepthChoice | None:
        """Error and cost with a fraction of the blocks; None if that depth was not measured."""
        if not 0 < depth <= 1:
            raise ExportError(
                f"depth={depth}: it is a fraction of the blocks, above 0 and at most 1"
            )
        blocks = blocks_at(depth, len(self.order))
        return next((choice for choice in self.choices if choice.blocks == blocks), None)

    def to_json(self) -> str:
        """The description as one JSON object, indented."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1)


def read_description(text: str) -> Description:
    """The description that `to_json` wrote.

    Raises:
        ExportError: when the text is not such a description.
    """
    try:
        values = json.loads(text)
        form = values.pop("format")
        if form != FORMAT:
            raise ExportError(
                f"its format is {form!r}, this version reads {FORMAT}: export the run again"
            )
        read = Description(
            **values
            | {
                "architecture": Architecture(**_tuples(values["architecture"])),
                "input": ImageInput(**_tuples(values["input"])),
                "classes": tuple(map(str, values["classes"])),
                "order": tuple(values["order"]),
                "choices": tuple(DepthChoice(**choice) for choice in values["choices"]),
            }
        )
        _check(read)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, ExportError):
            raise
        raise ExportError(f"its description cannot be understood: {error}") from error
    return read


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _check(read: Description) -> None:
    """Raise `ExportError` for numbers that are out of range, or do not fit each other."""
    shape, mean, std = read.input.shape, read.input.mean, read.input.std
    removed, order = read.architecture.removed, read.order
    counts = [choice.blocks for choice in read.choices]
    right = (
        len(shape) == 3
        and all(isinstance(n, int) and 0 < n <= 4096 for n in (*shape, read.input.shorter_side))
        and len(mean) == len(std) == shape[0] in (1, 3)
        and all(isinstance(n, int | float) for n in (*mean, *std))
        and all(n > 0 for n in std)
        and read.input.scaling in get_args(Scaling)
        and all(isinstance(n, int) and n >= 0 for n in (*removed, *order, *counts))
        and len(set(removed)) == len(removed)
        and sorted(order) == list(range(len(order)))
        and all(1 <= n <= len(order) for n in counts)
        and all(isinstance(n, int | float) for c in read.choices for n in dataclasses.astuple(c))
        and isinstance(read.architecture.arguments, dict)
    )
    if not right:
        raise ExportError(
            f"its description cannot be understood: input {read.input}, blocks removed {removed}, "
            f"order {order}, measured with {counts} blocks"
        )
