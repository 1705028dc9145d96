"""Learn from the example which values that enter a branch hold samples, for subset gates.

A branch runs on the drawn samples only, which are selected from every value that enters it. The
length of a tensor does not say what it holds: a mask [time, time] may be as long as the batch. So
the model runs on all samples of the example and on half of them; a value that has half the length
then is taken to hold samples, at this place in the code, from then on.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.errors import GateError
from stochastic_depth.gates import Gate

SAMPLES = "_stochastic_depth_samples"
"""The attribute of a module: at which places of its code a tensor holds samples."""

Seen = dict[tuple[nn.Module, Hashable], list[tuple[int, ...]]]
"""The shapes of the tensors that came by, by module and place."""

_seen: list[Seen] = []


@contextmanager
def noted() -> Iterator[Seen]:
    """While entered, note what comes into branches; gates must be for all samples."""
    seen: Seen = {}
    _seen.append(seen)
    try:
        yield seen
    finally:
        _seen.pop()


def samples(module: nn.Module, gate: Gate, value: Any, place: Hashable) -> Any:
    """The samples that the branch runs on, of tensors [batch, ...] from outside of it.

    Args:
        module: whose code it is.
        value: a tensor; or tuples, lists and mappings, in which tensors have places of their own.
        place: where in the code, and which variable.

    Raises:
        GateError: when a tensor that was not there on the example is as long as the batch.
    """
    if gate.samples is None:
        return value
    if isinstance(value, Tensor):
        if not torch.compiler.is_compiling() and _seen:
            _seen[-1].setdefault((module, place), []).append(tuple(value.shape))
            return value
        if value.ndim == 0 or len(value) != gate.batch or len(gate.samples) == gate.batch:
            return value
        known = module.__dict__.get(SAMPLES, {})
        if place not in known:
            raise GateError(
                f"a tensor {list(value.shape)} comes into a branch of {type(module).__name__} that "
                f"was not there on the example, and may or may not hold the {gate.batch} samples: "
                "give sd.apply an example with it"
            )
        return value.index_select(0, gate.samples.to(value.device)) if known[place] else value
    if type(value) in (tuple, list):
        parts = [samples(module, gate, each, (place, n)) for n, each in enumerate(value)]
        changed = any(new is not old for new, old in zip(parts, value, strict=True))
        return type(value)(parts) if changed else value  # which the branch may append to
    if type(value) is dict:
        return {key: samples(module, gate, each, (place, key)) for key, each in value.items()}
    return value
