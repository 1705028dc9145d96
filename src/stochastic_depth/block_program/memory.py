"""The memory of a training step: flat parameters and their optimizer, and reused activations."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

ALIGNMENT = 32
"""Every parameter begins at a multiple of this many elements: on a cache line, in bfloat16 too."""


class FlatParameters:
    """Makes all parameters of a network views of one flat tensor.

    One operation then converts, clears or updates all of them. Names, shapes and values stay, so
    the network works as before. The weights of convolutions are laid out as channels_last.

    Args:
        parts: modules that together hold every parameter once. The parameters of each become one
            segment.
        dtype: the type in which the network computes with the parameters.
    """

    def __init__(self, parts: Sequence[nn.Module], dtype: torch.dtype) -> None:
        self._starts: dict[Tensor, int] = {}
        self.segments: list[slice] = []
        end = 0
        for part in parts:
            start = end
            for parameter in part.parameters():
                self._starts[parameter] = end
                end += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
            self.segments.append(slice(start, end))
        first = next(iter(self._starts))
        self.values = torch.zeros(end, dtype=first.dtype, device=first.device)
        self.gradients = torch.zeros_like(self.values)
        self.momentum = torch.zeros_like(self.values)
        self.working = (
            self.values if dtype == first.dtype else torch.zeros_like(self.values).to(dtype)
        )
        for parameter in self._starts:
            view = self.view(parameter, self.values)
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.grad = None

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._starts)

    def view(self, parameter: Tensor, buffer: Tensor) -> Tensor:
        """The part of `buffer` that belongs to `parameter`, in its shape."""
        start = self._starts[parameter]
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
    """Updates all of `flat`, or some of its segments, as `optimizer` would update the parameters.

    Momentum and hyperparameters stay in `optimizer`, so that its checkpoints do not change. It must
    have no dampening: that does not apply to the first gradient of a parameter, and a buffer of
    momentum that is there from the start does not show which gradient is the first.
    """

    def __init__(self, flat: FlatParameters, optimizer: torch.optim.SGD) -> None:
        self._optimizer = optimizer
        parts = [slice(None), *flat.segments]
        self._parts = [nn.Parameter(flat.values[part]) for part in parts]
        self._gradients = [flat.gradients[part] for part in parts]
        self._flat_sgd = torch.optim.SGD(self._parts, fused=True)
        for parameter in flat:
            view = flat.view(parameter, flat.momentum)
            momentum = optimizer.state[parameter].get("momentum_buffer")
            if momentum is not None:
                view.copy_(momentum)
            optimizer.state[parameter]["momentum_buffer"] = view
        for part, values in zip(parts, self._parts, strict=True):
            self._flat_sgd.state[values]["momentum_buffer"] = flat.momentum[part]

    def step(self, updated: Sequence[bool]) -> None:
        """Update the segments for which `updated` is true; the others stay as they are."""
        group = self._optimizer.param_groups[0]
        self._flat_sgd.param_groups[0].update({name: group[name] for name in _HYPERPARAMETERS})
        # The first part is the whole buffer: one fused operation, where all segments are updated.
        whole = all(updated)
        chosen = [whole, *(each and not whole for each in updated)]
        for values, gradient, is_chosen in zip(self._parts, self._gradients, chosen, strict=True):
            values.grad = gradient if is_chosen else None
        self._flat_sgd.step()


class Buffers:
    """Keeps tensors for reuse: fresh memory of the system is slow when it is first touched."""

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
