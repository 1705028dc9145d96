"""Put gates into the blocks of a model, and take them out."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from stochastic_depth.block import Block, count_inside, owned_parameters
from stochastic_depth.errors import UnsupportedBlockError
from stochastic_depth.gates import BlockGates
from stochastic_depth.residual import Residual
from stochastic_depth.surgery.blocks import Found, unsupported
from stochastic_depth.surgery.edits import Edit, Entry
from stochastic_depth.surgery.install import install, is_installed, ungated_class, uninstall


def put_gates(model: nn.Module, found: Sequence[Found], select: bool) -> list[Block]:
    """Install gates in all modules of all blocks: one for each unit."""
    edits: dict[nn.Module, dict[Edit, BlockGates]] = {}
    blocks: list[Block] = []
    there = count_inside(name for name, _ in model.named_parameters())
    for block in found:
        if isinstance(block.module, Residual):
            install(block.module, {})
            block.module.gates = BlockGates()
            blocks.append(_block(model, there, block, (block.module.gates,)))
            continue
        gates = tuple(BlockGates() for _ in block.units)
        for unit, of_unit in zip(block.units, gates, strict=True):
            for module, edit in unit.edits:
                edits.setdefault(module, {})[edit] = of_unit
        blocks.append(_block(model, there, block, gates))
    if any(block.mechanism == "deferred" for block in found):
        edits.setdefault(model, {})[Entry()] = BlockGates()
    holds = {m: block for block in found for unit in block.units for m, _ in unit.edits}
    for module, of_module in edits.items():
        try:
            install(module, of_module, select)
        except UnsupportedBlockError as error:
            block = holds.get(module, found[0])
            raise unsupported(block.name, block.module, error) from error
    return blocks


def _block(
    model: nn.Module, there: Mapping[str, int], found: Found, gates: tuple[BlockGates, ...]
) -> Block:
    edited = (module for unit in found.units for module, _ in unit.edits)
    owned = owned_parameters(model, found.parameters, there)
    asking = tuple(dict.fromkeys(edited)) or (found.module,)
    return Block(found.name, gates, found.parameters, found.module, asking, owned)


def take_gates(model: nn.Module) -> None:
    """Undo `put_gates`, whole or in part."""
    for module in model.modules():
        if isinstance(module, Residual):
            module.gates = None
        if is_installed(module):
            uninstall(module)


@contextmanager
def ungated(model: nn.Module) -> Iterator[None]:
    """While entered, `model` is the original one."""
    installed = [(module, type(module)) for module in model.modules() if is_installed(module)]
    residuals = [(m, m.gates) for m in model.modules() if isinstance(m, Residual)]
    for module, kind in installed:
        module.__class__ = ungated_class(kind)
    for residual, _ in residuals:
        residual.gates = None
    try:
        yield
    finally:
        for module, kind in installed:
            module.__class__ = kind
        for residual, gates in residuals:
            residual.gates = gates
