"""Which parameters belong to which block.

A parameter belongs to a block if its gradient is known to be zero, or missing, while the block is
closed.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from stochastic_depth.block import Route
from stochastic_depth.surgery.blocks import MODULE_CONTAINERS, FoundBlock
from stochastic_depth.surgery.find.groups import only_needed
from stochastic_depth.surgery.record.branches import AdditionEvent, Analysis

BlockWithEvents = tuple[FoundBlock, tuple[AdditionEvent, ...]]
"""A block, and the additions of the recorded pass that it makes."""


def attribute_parameters(
    pairs: Sequence[BlockWithEvents], model: nn.Module, analysis: Analysis
) -> list[BlockWithEvents]:
    """The blocks, each with the parameters that belong to it.

    A parameter that the branches of several blocks use belongs to each of these blocks: it has no
    gradient while all of them are closed. A parameter that the model uses outside of branches too,
    such as that of a condition which several branches read, belongs to no block. An element of a
    list that the example does not use, such as an expert that got no samples, belongs to the blocks
    that have everything which the example uses of this list.
    """
    first_name = {id(p): name for name, p in model.named_parameters()}
    only = [_only_for(block, events, analysis) for block, events in pairs]
    branches = set[int]().union(*only)
    values = analysis.recording.values
    used = {n: values[v].children for n, v in analysis.recording.numbers_of_parameters().items()}
    users = {name: analysis.alive.intersection(by) for name, by in used.items() if by}
    owners: dict[str, set[int]] = {name: set() for name in users}
    for number, (block, _) in enumerate(pairs):
        for name in block.parameters:
            first = first_name[id(model.get_parameter(name))]
            of_first = users.get(first, set())
            if of_first <= branches and (not of_first or not only[number].isdisjoint(of_first)):
                owners.setdefault(first, set()).add(number)
    owners |= dict(_owners_of_unused(model, owners))
    return [
        (replace(block, parameters=tuple(sorted(n for n in owners if number in owners[n]))), events)
        for number, (block, events) in enumerate(pairs)
    ]


def _only_for(block: FoundBlock, events: Sequence[AdditionEvent], analysis: Analysis) -> Set[int]:
    """The values that only the branch of a block needs; all of them if it is registered."""
    if block.is_registered:
        return frozenset[int]().union(*(event.branch for event in events))
    return only_needed(events, analysis)


class NamedRoutes(NamedTuple):
    """As `Routes`, with the names of parameters."""

    blocks: tuple[Route, ...]
    parameters: tuple[tuple[Route, tuple[str, ...]], ...]


def routes_of_gradients(
    pairs: Sequence[BlockWithEvents], found: Sequence[FoundBlock], analysis: Analysis
) -> NamedRoutes:
    """The routes on which gradients come to the blocks and parameters of the recorded pass.

    An example is an encoder whose output only the branches of a decoder read: gradients come to it
    through these branches alone.

    Args:
        found: all blocks, in the order of their numbers. To those that run in training mode only,
            which the recorded pass does not have, the route is taken for direct.
    """
    numbers = {block.name: number for number, block in enumerate(found)}
    events_of = {numbers[block.name]: events for block, events in pairs if block.name in numbers}
    branch_of = {(e.added, e.total): n for n, events in events_of.items() for e in events}
    routes = _routes(branch_of, analysis)
    blocks = tuple(
        _joined(routes.get(event.total, NOWHERE) for event in events_of[number])
        if number in events_of
        else Route(True, frozenset())
        for number in range(len(found))
    )
    by_route: dict[Route, list[str]] = {}
    for name, number in analysis.recording.numbers_of_parameters().items():
        route = routes.get(number, NOWHERE)
        if not route.directly and route.branches:
            by_route.setdefault(route, []).append(name)
    return _where_needed(blocks, by_route)


def _routes(branch_of: Mapping[tuple[int, int], int], analysis: Analysis) -> dict[int, Route]:
    """For each value that an output depends on, how gradients come to it.

    Args:
        branch_of: the numbers of blocks, by the result of their branch and the sum.
    """
    found: dict[int, Route] = {}
    for number in sorted(analysis.alive, reverse=True):  # what is computed from a value comes later
        directly, branches = number in analysis.outputs, set[int]()
        for child in analysis.recording.values[number].children:
            block = branch_of.get((number, child))
            if block is not None:
                branches.add(block)
            elif child in found:
                directly |= found[child].directly
                branches |= found[child].branches
        found[number] = Route(directly, frozenset(branches))
    return found


def routes_of_units(blocks: Sequence[FoundBlock], model: nn.Module) -> NamedRoutes:
    """As `routes_of_gradients`, for `Residual` units, to which all routes are taken for direct."""
    users: dict[int, set[int]] = {}
    name_of: dict[int, str] = {}
    for number, block in enumerate(blocks):
        for name in block.parameters:
            parameter = id(model.get_parameter(name))
            name_of.setdefault(parameter, name)
            users.setdefault(parameter, set()).add(number)
    by_route: dict[Route, list[str]] = {}
    for parameter, numbers in users.items():
        by_route.setdefault(Route(False, frozenset(numbers)), []).append(name_of[parameter])
    return _where_needed((Route(True, frozenset()),) * len(blocks), by_route)


NOWHERE = Route(False, frozenset())
"""The route to a value that no output depends on."""


def _joined(routes: Iterable[Route]) -> Route:
    found = list(routes)
    return Route(
        any(route.directly for route in found),
        frozenset[int]().union(*(route.branches for route in found)),
    )


def _where_needed(
    blocks: tuple[Route, ...], by_route: Mapping[Route, Sequence[str]]
) -> NamedRoutes:
    """Without the parameters of one block each to which there is a direct route."""
    parameters = tuple(
        (route, tuple(names))
        for route, names in by_route.items()
        if len(route.branches) > 1 or not all(blocks[b].directly for b in route.branches)
    )
    return NamedRoutes(blocks if parameters else (), parameters)


def attribute_parameters_of_units(
    blocks: Sequence[FoundBlock], model: nn.Module
) -> list[FoundBlock]:
    """`Residual` units, each with the parameters of its branch that no other module has too."""
    branches = tuple(f"{block.name}.branch." if block.name else "branch." for block in blocks)
    named = model.named_parameters(remove_duplicate=False)
    outside = {id(parameter) for name, parameter in named if not name.startswith(branches)}
    return [
        replace(
            block,
            parameters=tuple(
                n for n in block.parameters if id(model.get_parameter(n)) not in outside
            ),
        )
        for block in blocks
    ]


def _owners_of_unused(
    model: nn.Module, owners: Mapping[str, set[int]]
) -> Iterator[tuple[str, set[int]]]:
    """The parameters in lists that the example does not use, each with its blocks.

    Args:
        owners: the blocks to which each parameter that it uses belongs.
    """
    of_all_inside: dict[str, set[int]] = {}
    for name, blocks in owners.items():
        for around in _modules_around(name):
            of_all_inside[around] = of_all_inside.get(around, blocks) & blocks
    for name, _ in model.named_parameters():
        around = next((m for m in _modules_around(name) if m in of_all_inside), "")
        if name not in owners and isinstance(model.get_submodule(around), MODULE_CONTAINERS):
            yield name, of_all_inside.get(around, set())


def _modules_around(name: str) -> Iterator[str]:
    """The names of the modules around a parameter, innermost first, without the model itself."""
    while name := name.rpartition(".")[0]:
        yield name
