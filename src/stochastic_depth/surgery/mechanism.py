"""How one residual addition is made skippable: as registered, cut in the source, or as a whole."""

from collections.abc import Mapping

from torch import nn

from stochastic_depth.errors import UnsupportedBlockError
from stochastic_depth.surgery.cutting.slicing import skipped_when_closed
from stochastic_depth.surgery.discovery.cuts import Argument, Cut, Opaque, Registered, Sliced
from stochastic_depth.surgery.discovery.discover import Addition
from stochastic_depth.surgery.install import gated_class
from stochastic_depth.surgery.registry import registered


def cuts_of(
    addition: Addition, modules: Mapping[str, nn.Module], alone: bool
) -> tuple[tuple[nn.Module, Cut], ...]:
    """Where the modules get the gate of `addition`, the one that adds first.

    Args:
        modules: by name.
        alone: whether it is the only addition of its owner.

    Raises:
        UnsupportedBlockError: when there is no way; says what was tried.
    """
    whole = registered_around(addition.owner, modules)
    if whole is not None:
        forward = registered(type(modules[whole]))
        assert forward is not None
        return ((modules[whole], Registered(forward)),)
    try:
        return _sliced(addition, modules)
    except UnsupportedBlockError as error:
        if addition.whole and alone:
            return ((modules[addition.owner], Opaque()),)
        raise UnsupportedBlockError(
            f"{error}; nor can it be skipped as a whole, because it is more than its input plus "
            "one branch"
        ) from error


def _sliced(
    addition: Addition, modules: Mapping[str, nn.Module]
) -> tuple[tuple[nn.Module, Cut], ...]:
    if addition.begins_elsewhere:
        raise UnsupportedBlockError("its branch begins outside of the model's modules")
    cuts: list[tuple[nn.Module, Cut]] = []
    skips = False
    for name, cut in addition.cuts:
        mine: list[Sliced]
        if cut is None:
            raise UnsupportedBlockError(
                f"its addition is not in a method of {type(modules[name]).__name__}, but in a "
                "function that one calls"
            )
        mine = [cut]
        calls, unused = skipped_when_closed(cut)
        skips |= calls
        for caller in cut.callers:  # which may compute the branch for the method they call
            if not unused:
                break
            mine.append(Argument(caller.place, unused, caller.idle))
            calls, unused = skipped_when_closed(mine[-1])
            skips |= calls
        gated_class(type(modules[name]), tuple(mine), False, False, "")
        cuts += [(modules[name], each) for each in mine]
    if not skips:
        raise UnsupportedBlockError(
            f"{cuts[0][1]}: the model needs all of its branch for other things too"
        )
    return tuple(cuts)


def registered_around(owner: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The nearest module, from `owner` outwards, of a registered class."""
    name = owner
    while name and registered(type(modules[name])) is None:
        name = name.rpartition(".")[0]
    return name or None
