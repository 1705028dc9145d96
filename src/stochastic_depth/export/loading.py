"""Build a network from the file that it was exported to."""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from stochastic_depth.errors import ExportError
from stochastic_depth.export.description import (
    KEY,
    Description,
    read_description,
    remove_blocks,
)
from stochastic_depth.extras import require


class Exported(NamedTuple):
    """A plain network in evaluation mode, and what its file says of it."""

    model: nn.Module
    description: Description


def load_export(path: Path | str, depth: float = 1.0) -> Exported:
    """The plain network in a safetensors file that `stochastic-depth export` wrote.

    Nothing is unpickled. The weights must be those of the network that the file describes, name by
    name and shape by shape.

    Args:
        path: the file.
        depth: the share of blocks to run, of a file exported with --elastic: one of those that were
            measured. The blocks that it needs least are left out.

    Raises:
        ExportError: when the file is missing, damaged, foreign, or has one depth only.
        MissingExtraError: when safetensors is not installed.
    """
    safetensors = require("safetensors", "train")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ExportError(f"{path} is not there") from None
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise ExportError(f"{path} is no whole safetensors file ({error})") from error
    if KEY not in metadata:
        raise ExportError(
            f"{path} does not say what network its weights are of: give a file that "
            "stochastic-depth export wrote"
        )
    try:
        description = read_description(metadata[KEY])
        whole = {name: tensor for name, tensor in weights.items() if "/" not in name}
        model = description.architecture.build(len(whole))
        _load(model, whole)
        if depth != 1:
            _lower(model, description, depth, weights)
    except ExportError as error:
        raise ExportError(f"{path}: {error}") from error
    return Exported(model.eval(), description)


def _lower(
    model: nn.Module, description: Description, depth: float, weights: dict[str, Tensor]
) -> None:
    """Leave out the blocks that are needed least, with the statistics that belong to that."""
    if not description.order:
        raise ExportError(f"depth={depth}: its depth is fixed; export with --elastic to choose it")
    choice = description.choice_at(depth)
    if choice is None:
        blocks = len(description.order)
        known = ", ".join(f"{each.blocks / blocks:.2g}" for each in description.choices)
        raise ExportError(f"depth={depth}: it was measured at {known}")
    remove_blocks(model, description.order[: len(description.order) - choice.blocks])
    start = f"{choice.blocks}/"
    own = {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
    _load(model, model.state_dict() | own)


def _load(model: nn.Module, weights: dict[str, Tensor]) -> None:
    expected = model.state_dict()
    wrong = sorted(expected.keys() ^ weights.keys())
    if wrong:
        where = "missing" if wrong[0] in expected else "of no use"
        raise ExportError(f"{len(wrong)} tensors do not fit the network: {wrong[0]!r} is {where}")
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            raise ExportError(
                f"{name!r} is {list(weights[name].shape)}, in the network {list(tensor.shape)}"
            )
    model.load_state_dict(weights)
