"""One residual block of a model with stochastic depth: its gates and its branch's parameters."""

from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import Any, NamedTuple

from torch import nn

from stochastic_depth.gates import BlockGates, Gate


class OwnedParameters(NamedTuple):
    """A parameter or child of a module that belongs to a branch.

    It is identified by its owner and its name there, because wrapping a model changes names.
    """

    owner: nn.Module
    name: str
    """The name of a child of `owner` that belongs entirely to the branch, or of a parameter."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that have this name now, even if they were replaced."""
        child = self.owner._modules.get(self.name)
        if child is not None:
            yield from child.parameters()
            return
        own = self.owner._parameters
        changed = self.owner._modules.get("parametrizations")
        if own.get(self.name) is not None:
            yield own[self.name]  # pyright: ignore[reportReturnType]
        elif isinstance(changed, nn.ModuleDict) and self.name in changed:
            yield from changed[self.name].parameters()
        else:  # pruned, or normalised by torch.nn.utils.weight_norm or spectral_norm
            parts = (own.get(f"{self.name}_{part}") for part in ("orig", "g", "v"))
            yield from (part for part in parts if part is not None)


class Route(NamedTuple):
    """How gradients come to a value from the outputs."""

    directly: bool
    """Whether there is a way that leads through no branch of a block."""
    branches: frozenset[int]
    """The numbers of the blocks through whose branches the other ways lead first."""

    def is_open(self, reached: Set[int]) -> bool:
        """Whether a gradient comes, if it comes to the outputs of the branches `reached`."""
        return self.directly or not self.branches.isdisjoint(reached)


@dataclass(frozen=True)
class Routes:
    """The routes on which gradients come to blocks and parameters, where not all are direct."""

    blocks: tuple[Route, ...] = ()
    """Those to the sum of each block; empty if all are direct."""
    parameters: tuple[tuple[Route, tuple[OwnedParameters, ...]], ...] = ()
    """Those to parameters that several branches use, or that belong to a block to which no route is
    direct."""

    def divide(self, learns: Sequence[bool]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """These parameters, divided into those to which a gradient comes, and the others.

        Args:
            learns: for each block, whether gradients pass through its branch.
        """
        reached, before = set[int](), -1
        while len(reached) > before:
            before = len(reached)
            for number, route in enumerate(self.blocks):
                if learns[number] and route.is_open(reached):
                    reached.add(number)
        with_gradient: list[nn.Parameter] = []
        without: list[nn.Parameter] = []
        for route, owned in self.parameters:
            parameters = (p for each in owned for p in each.parameters() if p.requires_grad)
            (with_gradient if route.is_open(reached) else without).extend(parameters)
        return with_gradient, without


@dataclass
class Block:
    """One residual block of a model: open or closed as a whole."""

    name: str
    gates: tuple[BlockGates, ...] = field(repr=False)
    """The gates of each of its additions."""
    parameters: tuple[str, ...]
    """Names of the parameters of its branch, in the model on which `sd.apply` was called."""
    module: nn.Module = field(repr=False)
    """The module that the block is named after."""
    gate_readers: tuple[nn.Module, ...] = field(repr=False)
    """The modules that read its gates. While one is in training mode, it reads the training
    gates."""
    owned: tuple[OwnedParameters, ...] = field(repr=False)
    """The parameters of its branch."""
    observed_module: nn.Module = field(repr=False)
    """The module itself if its additions are made inside of it, or else the module that adds."""
    _state: "_BranchState | None" = field(default=None, repr=False)
    """The modules and parameters of the branch, cached because collecting them is slow."""

    @property
    def evaluation_gate(self) -> Gate:
        """The gate in evaluation."""
        return self.gates[0].evaluation

    @property
    def is_training(self) -> bool:
        """Whether any of the modules that read its gates is in training mode."""
        return any(module.training for module in self.gate_readers)

    def trained(self) -> list[nn.Parameter]:
        """The parameters that its branch has now and that require a gradient."""
        state = self._state
        if state is None or not state.is_current():
            state = self._state = _BranchState(self.owned)
        return [p for p in state.parameters if p.requires_grad]

    def sparse_weights(self) -> list[nn.Parameter]:
        """The weights with sparse gradients: those of embeddings with `sparse=True`."""
        state = self._state or _BranchState(self.owned)
        return [t.get_parameter("weight") for t in state.tables if t.sparse] if state.tables else []

    def __getstate__(self) -> dict[str, Any]:  # a copy caches the state of its own branch
        return {**self.__dict__, "_state": None}


class _BranchState:
    """The modules and parameters of a branch at the time when they were collected."""

    def __init__(self, owned: Sequence[OwnedParameters]) -> None:
        self._children = [
            (each.owner._modules, name, each.owner._modules[name])
            for each in owned
            for name in (each.name, "parametrizations")
            if name in each.owner._modules
        ]
        inside = [m for _, _, child in self._children if child is not None for m in child.modules()]
        owners = [each.owner for each in owned if each.name not in each.owner._modules]
        dictionaries = [d for m in inside for d in (m._modules, m._parameters)]
        dictionaries += [owner._parameters for owner in owners]
        self._views = [dictionary.values() for dictionary in dictionaries]
        self._held = list(chain.from_iterable(self._views))  # kept, so that no id is reused
        self._ids = list(map(id, self._held))
        self.parameters = list(dict.fromkeys(p for each in owned for p in each.parameters()))
        mine = set(self.parameters)
        tables = [m for m in [*inside, *owners] if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
        self.tables = [table for table in tables if table._parameters.get("weight") in mine]

    def is_current(self) -> bool:
        """Whether the branch still has the same modules and parameters."""
        for modules, name, child in self._children:
            if modules.get(name) is not child:
                return False
        return self._ids == list(map(id, chain.from_iterable(self._views)))


class ParameterOwners:
    """The modules of a model that have its parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # A parameter that several modules share has several names, and each of them counts.
        names = (name for name, _ in model.named_parameters(remove_duplicate=False))
        self._count = _count_inside(names)

    def of(
        self, names: Iterable[str], around: Iterable[nn.Module] = ()
    ) -> tuple[OwnedParameters, ...]:
        """The parameters of the model with these names, by owner.

        Where possible the result has a whole module in place of its parameters: as few and as large
        modules as possible, all of whose parameters are among the names.

        Args:
            around: modules that run under a closed gate too. No module of the result contains one,
                because what such a module is wrapped in later runs then as well.
        """
        around = set(around)
        names = list(dict.fromkeys(names))
        wanted = _count_inside(names)
        result: dict[OwnedParameters, None] = {}
        for name in names:
            path = name.split(".")
            for length in range(1, len(path) + 1):
                inside = ".".join(path[:length])
                if length == len(path) or (
                    wanted[inside] == self._count.get(inside)
                    and around.isdisjoint(self._model.get_submodule(inside).modules())
                ):
                    owner = self._model.get_submodule(".".join(path[: length - 1]))
                    result[OwnedParameters(owner, path[length - 1])] = None
                    break
        return tuple(result)


def _count_inside(names: Iterable[str]) -> dict[str, int]:
    """How many of `names` are inside each module, by name of the module."""
    count: dict[str, int] = {}
    for name in names:
        while name := name.rpartition(".")[0]:
            count[name] = count.get(name, 0) + 1
    return count


def set_training_gates(blocks: Iterable[Block], gates: Iterable[Gate | None]) -> None:
    """Give each block its gate of the current training pass; None between passes."""
    for block, gate in zip(blocks, gates, strict=True):
        for addition in block.gates:
            addition.training = gate


def set_evaluation_gates(
    blocks: Iterable[Block], gates: Iterable[Gate], forced: Iterable[Gate] | None = None
) -> None:
    """Give each block its gate of evaluation, and that which is `forced` in its place, if any."""
    for block, gate, in_force in zip(blocks, gates, forced or repeat(None), strict=False):
        for addition in block.gates:
            addition.evaluation = in_force or gate
            addition.unforced = None if in_force is None else gate


@contextmanager
def force(blocks: Sequence[Block], gates: Gate | Sequence[Gate]) -> Iterator[None]:
    """While entered, `blocks` have these gates, in training and in evaluation.

    It is for a model that has no handle yet, and for gates of any form. Otherwise use
    `Handle.forced`.

    Args:
        gates: one for each block, or one for all of them.
    """
    gates = [gates] * len(blocks) if isinstance(gates, Gate) else gates
    additions = [(a, g) for b, g in zip(blocks, gates, strict=True) for a in b.gates]
    before = [(addition.training, addition.evaluation) for addition, _ in additions]
    for addition, gate in additions:
        addition.training = addition.evaluation = gate
    try:
        yield
    finally:
        for (addition, _), (training, evaluation) in zip(additions, before, strict=True):
            addition.training, addition.evaluation = training, evaluation
