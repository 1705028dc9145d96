"""The memory of a training step: flat parameters and their optimizer, and reused activations."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

ALIGNMENT = 32
"""Every parameter begins at a multiple of this many elements: on a cache line, in bfloat16 too."""


class FlatParameters:
    """Makes the parameters of a network views of one tensor.

    One operation then converts, clears or updates all of them. Names, shapes and values stay, so
    the network works as before. The weights of convolutions are laid out as channels_last.

    Args:
        parts: modules that together hold every parameter once. Each becomes one segment.
        dtype: the type in which the network computes with the parameters.
    """

    def __init__(self, parts: Sequence[nn.Module], dtype: torch.dtype) -> None:
        self._places: dict[Tensor, int] = {}
        self.segments: list[slice] = []
        end = 0
        for part in parts:
            start = end
            for parameter in part.parameters():
                self._places[parameter] = end
                end += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
            self.segments.append(slice(start, end))
        first = next(iter(self._places))
        self.values = torch.zeros(end, dtype=first.dtype, device=first.device)
        self.gradients = torch.zeros_like(self.values)
        self.momentum = torch.zeros_like(self.values)
        self.working = (
            self.values if dtype == first.dtype else torch.zeros_like(self.values).to(dtype)
        )
        for parameter in self._places:
            view = self.of(parameter, self.values)
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.grad = None

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._places)

    def of(self, parameter: Tensor, buffer: Tensor) -> Tensor:
        """The part of `buffer` that belongs to `parameter`, in its shape."""
        start = self._places[parameter]
        flat = buffer[start : start + parameter.numel()]
        if parameter.ndim != 4:
            return flat.view(parameter.shape)
        out, into, height, width = parameter.shape
        return flat.view(out, height, width, into).permute(0, 3, 1, 2)

    def cast(self) -> None:
        """Update the working copy of the parameters, with one conversion for all layers."""
        if self.working is not self.values:
            self.working.copy_(self.values)


_HYPERPARAMETERS = ("lr", "momentum", "weight_decay", "nesterov", "maximize")


class FlatSGD:
    """SGD on all of `flat` or some segments, with the arithmetic of `optimizer` on parameters.

    Momentum and hyperparameters stay in `optimizer`, so that its checkpoints do not change. It must
    have no dampening: that does not apply to the first gradient of a parameter, and a buffer of
    momentum that is there from the start does not show which gradient is the first.
    """

    def __init__(self, flat: FlatParameters, optimizer: torch.optim.SGD) -> None:
        self._outer = optimizer
        parts = [slice(None), *flat.segments]
        self._parts = [nn.Parameter(flat.values[part]) for part in parts]
        self._gradients = [flat.gradients[part] for part in parts]
        self._inner = torch.optim.SGD(self._parts, fused=True)
        for parameter in flat:
            view = flat.of(parameter, flat.momentum)
            known = optimizer.state[parameter].get("momentum_buffer")
            if known is not None:
                view.copy_(known)
            optimizer.state[parameter]["momentum_buffer"] = view
        for part, values in zip(parts, self._parts, strict=True):
            self._inner.state[values]["momentum_buffer"] = flat.momentum[part]

    def step(self, moved: Sequence[bool]) -> None:
        """Update the segments that are `moved`; the others stay as they are."""
        group = self._outer.param_groups[0]
        self._inner.param_groups[0].update({name: group[name] for name in _HYPERPARAMETERS})
        whole = all(moved)
        parts = [whole, *(is_moved and not whole for is_moved in moved)]
        for values, gradient, is_moved in zip(self._parts, self._gradients, parts, strict=True):
            values.grad = gradient if is_moved else None
        self._inner.step()


class Buffers:
    """Keeps tensors for reuse: memory from the system is slow when it is first touched."""

    def __init__(self) -> None:
        self._free: defaultdict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)

    def take(self, like: Tensor) -> Tensor:
        """An uninitialised tensor of the shape, type and layout of `like`."""
        free = self._free[like.shape, like.dtype]
        return free.pop() if free else torch.empty_like(like)

    def give(self, *tensors: Tensor) -> None:
        """Return tensors that are not needed any more."""
        for tensor in tensors:
            self._free[tensor.shape, tensor.dtype].append(tensor)

    def __iter__(self) -> Iterator[Tensor]:
        """All free tensors."""
        for free in self._free.values():
            yield from free
