"""Load an exported network from its file."""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from stochastic_depth.errors import ExportError
from stochastic_depth.export.description import CHECKSUM, KEY, Description, read_description
from stochastic_depth.export.remove_blocks import blocks_of, remove_blocks
from stochastic_depth.files import is_there
from stochastic_depth.train.weights import checksum, read_safetensors


class Exported(NamedTuple):
    """A plain network in evaluation mode, and its description."""

    model: nn.Module
    description: Description


def load_export(path: Path | str, depth: float = 1.0) -> Exported:
    """Load the plain network from a safetensors file that `stochastic-depth export` wrote.

    Nothing is unpickled. The checksum of weights and description must match, and the weights must
    be those of the network that the file describes, name by name and shape by shape.

    Args:
        path: the file.
        depth: the fraction of blocks to run, for a file that was exported with --elastic; one of
            the fractions that were measured. The blocks that are needed least are left out.

    Raises:
        ExportError: when the file is missing, damaged, or not one that export wrote, or when
            `depth` was not measured.
        MissingExtraError: when safetensors is not installed.
    """
    path = Path(path)
    if not is_there(path):
        raise ExportError(f"{path} does not exist: give a file that stochastic-depth export wrote")
    metadata, weights = read_safetensors(path, ExportError)
    if KEY not in metadata:
        raise ExportError(
            f"{path} has no network description: give a file that stochastic-depth export wrote"
        )
    if CHECKSUM not in metadata:
        raise ExportError(f"{path} has no checksum: export the run again")
    if metadata.pop(CHECKSUM) != checksum(weights, metadata):
        raise ExportError(
            f"{path} is damaged or was changed, its checksum does not match: put a copy in its "
            "place, or export the run again"
        )
    try:
        description = read_description(metadata[KEY])
        full_depth = {name: tensor for name, tensor in weights.items() if "/" not in name}
        model = description.architecture.build(len(full_depth))
        _load(model, full_depth)
        if depth != 1:
            _lower(model, description, depth, weights)
    except ExportError as error:
        raise ExportError(f"{path}: {error}") from error
    return Exported(model.eval(), description)


def _lower(
    model: nn.Module, description: Description, depth: float, weights: dict[str, Tensor]
) -> None:
    """Remove the least needed blocks, and load the statistics that were measured without them.

    Raises:
        ExportError: when the file has one depth only, was not measured at `depth`, or orders the
            blocks of a different network.
    """
    if not description.order:
        raise ExportError(f"depth={depth}: its depth is fixed; export with --elastic to choose it")
    blocks = len(blocks_of(model))
    if len(description.order) != blocks:
        raise ExportError(f"it orders {len(description.order)} blocks, its network has {blocks}")
    choice = description.choice_at(depth)
    if choice is None:
        known = ", ".join(f"{each.blocks / blocks:.2g}" for each in description.choices)
        raise ExportError(f"depth={depth} was not measured: choose one of {known}")
    remove_blocks(model, description.order[: blocks - choice.blocks])
    start = f"{choice.blocks}/"
    own = {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
    _load(model, model.state_dict() | own)


def _load(model: nn.Module, weights: dict[str, Tensor]) -> None:
    expected = model.state_dict()
    wrong = sorted(expected.keys() ^ weights.keys())
    if wrong:
        where = "missing" if wrong[0] in expected else "unexpected"
        raise ExportError(f"{len(wrong)} tensors do not fit the network: {wrong[0]!r} is {where}")
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            raise ExportError(
                f"{name!r} is {list(weights[name].shape)}, in the network {list(tensor.shape)}: "
                "the description belongs to a different network, export the run again"
            )
    model.load_state_dict(weights)
