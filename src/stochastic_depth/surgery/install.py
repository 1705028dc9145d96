"""Install gates in modules and in the blocks of a model, and remove them.

A module of any class gets gates by replacing its class with a subclass of it (`gated_class`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from stochastic_depth.block import Block, ParameterOwners
from stochastic_depth.errors import UnsupportedBlockError
from stochastic_depth.gates import BlockGates
from stochastic_depth.residual import Residual
from stochastic_depth.surgery.blocks import FoundBlock, unsupported
from stochastic_depth.surgery.edits import DeferredEdit, Edit, EntryEdit
from stochastic_depth.surgery.gated_class import (
    GATES,
    OWN_FORWARD,
    fingerprint,
    gated_class,
    ungated_class,
)
from stochastic_depth.surgery.rewrite.select_samples import HOLDS_SAMPLES


def install(module: nn.Module, gates: Mapping[Edit, BlockGates], select: bool = False) -> None:
    """Install `gates` in `module`, in place, each at its edit, in the order of execution.

    The module keeps its parameters, its attributes and, for `isinstance`, its class. A `forward`
    that was set on the instance is kept under a different name, and the one with gates calls it.

    Args:
        select: whether a gate may run the branch on some of the samples only.

    Raises:
        UnsupportedBlockError: when a method cannot be edited; `module` is then as it was before.
    """
    own = "forward" in vars(module) and len(gates) > 0
    if own and not all(isinstance(edit, DeferredEdit | EntryEdit) for edit in gates):
        raise UnsupportedBlockError("its forward method is set on the instance, not in the class")
    cls = gated_class(type(module), tuple(gates), select, fingerprint(module), own)
    module.__dict__[GATES] = tuple(gates.values())
    module.__class__ = cls
    if own:
        _rename(module, "forward", OWN_FORWARD)


def uninstall(module: nn.Module) -> None:
    """Undo `install`."""
    module.__class__ = ungated_class(type(module))
    del module.__dict__[GATES]
    module.__dict__.pop(HOLDS_SAMPLES, None)
    if "forward" in vars(module):  # set since then
        vars(module).pop(OWN_FORWARD, None)
    _rename(module, OWN_FORWARD, "forward")


def _rename(module: nn.Module, attribute: str, to: str) -> None:
    """Rename an attribute in the dictionary of `module`, if it is there."""
    if attribute in vars(module):
        vars(module)[to] = vars(module).pop(attribute)


def is_installed(module: nn.Module) -> bool:
    return GATES in module.__dict__


def put_gates(model: nn.Module, found: Sequence[FoundBlock], select: bool) -> list[Block]:
    """Install gates in the modules of all blocks, one for each unit, and return the blocks."""
    edits: dict[nn.Module, dict[Edit, BlockGates]] = {}
    blocks: list[Block] = []
    owners = ParameterOwners(model)
    for block in found:
        if isinstance(block.module, Residual):
            install(block.module, {})
            block.module.gates = BlockGates()
            blocks.append(_block(owners, block, (block.module.gates,)))
            continue
        gates = tuple(BlockGates() for _ in block.units)
        for unit, of_unit in zip(block.units, gates, strict=True):
            for module, edit in unit.edits:
                edits.setdefault(module, {})[edit] = of_unit
        blocks.append(_block(owners, block, gates))
    if any(block.is_deferred for block in found):
        edits.setdefault(model, {})[EntryEdit()] = BlockGates()
    block_of = {m: block for block in found for unit in block.units for m, _ in unit.edits}
    for module, of_module in edits.items():
        try:
            install(module, of_module, select)
        except UnsupportedBlockError as error:
            block = block_of.get(module, found[0])
            raise unsupported(block.name, block.module, error) from error
    return blocks


def _block(owners: ParameterOwners, found: FoundBlock, gates: tuple[BlockGates, ...]) -> Block:
    edited = (module for unit in found.units for module, _ in unit.edits)
    gate_readers = tuple(dict.fromkeys(edited)) or (found.module,)
    owned = owners.of(found.parameters, around=gate_readers)
    inside = set(found.module.modules())
    observed = gate_readers[0] if inside.isdisjoint(gate_readers) else found.module
    return Block(found.name, gates, found.parameters, found.module, gate_readers, owned, observed)


def take_gates(model: nn.Module) -> None:
    """Undo `put_gates`, even if it was not completed."""
    for module in model.modules():
        if isinstance(module, Residual):
            module.gates = None
        if is_installed(module):
            uninstall(module)


@contextmanager
def ungated(model: nn.Module) -> Iterator[None]:
    """While entered, `model` behaves as the original model without gates."""
    installed = [(module, type(module)) for module in model.modules() if is_installed(module)]
    with_own_forward = [module for module, _ in installed if OWN_FORWARD in vars(module)]
    residuals = [(m, m.gates) for m in model.modules() if isinstance(m, Residual)]
    for module, cls in installed:
        module.__class__ = ungated_class(cls)
    for module in with_own_forward:
        _rename(module, OWN_FORWARD, "forward")
    for residual, _ in residuals:
        residual.gates = None
    try:
        yield
    finally:
        for module, cls in installed:
            module.__class__ = cls
        for module in with_own_forward:
            _rename(module, "forward", OWN_FORWARD)
        for residual, gates in residuals:
            residual.gates = gates
