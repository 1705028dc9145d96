"""Which operand of an addition is its shortcut, if the addition is residual."""

from collections.abc import Container, Set

from torch import nn

from stochastic_depth.surgery.addition_functions import Side
from stochastic_depth.surgery.record.trace import Call, Recording, calls_during

MIXES = (
    "linear",
    "conv",
    "mm",
    "matmul",
    "einsum",
    "dot",
    "attention",
    "pool",
    "fft",
    "lstm",
    "gru",
    "rnn",
    "unseen",
)
"""Parts of the names of functions that mix values; a branch contains at least one such function.

A computation that only adds to a value, scales it or applies a function to each number is not a
branch. Examples are an activation that is written out, a rotary embedding and a normalisation.
"unseen" stands for a function that the recording did not see."""


ACTIVATIONS = ("relu", "gelu", "silu", "swish", "sigmoid", "tanh", "elu", "mish", "softmax", "glu")
"""Parts of the names of functions that a projection shortcut never contains."""


SPLITS = {"chunk", "split", "unbind", "__getitem__", "narrow", "tensor_split"}


REARRANGES = SPLITS | {"view", "reshape", "permute", "transpose", "contiguous", "flatten", "clone"}
REARRANGES |= {"unflatten", "squeeze", "unsqueeze", "to", "float", "rearrange", "movedim", "select"}
"""Names of functions that return their argument, or a part of it, in a different form."""


PROJECTIONS = ("shortcut", "skip", "down", "proj", "ident", "res")
"""Parts of the names of modules that project a shortcut without changing its shape."""


class Shortcuts:
    """Decides which operand of an addition in a recorded forward pass is the shortcut.

    Values are given by their numbers in the recording.

    Args:
        sums: the results of the residual additions found so far.
    """

    def __init__(self, recording: Recording, sums: Container[int]) -> None:
        self.recording, self.sums = recording, sums

    def identity(self, left: int, right: int, call: Call) -> Side | None:
        """Which operand the other one was computed from, if it is not from before the inputs of
        `call`."""
        if call.earliest <= left and left in self.recording.reach(right, left):
            return 0
        if call.earliest <= right and right in self.recording.reach(left, right):
            return 1
        return None

    def side(self, left: int, right: int, call: Call) -> Side | None:
        """Which operand is the shortcut of an addition that `call` makes; None if it has none."""
        identity = self.identity(left, right, call)
        return self._projection(left, right, call) if identity is None else identity

    def _projection(self, left: int, right: int, call: Call) -> Side | None:
        """Which operand is a projection of a value that the other one was computed from, too."""
        reached = self._reached(left, right, call)
        if not (call.inputs & reached[0] and call.inputs & reached[1]):
            return None
        if (left in self.sums) != (right in self.sums):  # x + f(x) + g(x)
            return 0 if left in self.sums else 1
        made = [sum(value >= call.began for value in values) for values in reached]
        if made[0] < made[1] and self._is_projection(reached[0], reached[1]):
            return 0
        if made[1] < made[0] and self._is_projection(reached[1], reached[0]):
            return 1
        return None

    def part(self, left: int, right: int, call: Call) -> Side | None:
        """Which operand is an unchanged part of the input of `call`, or one of its streams.

        The other operand is computed from the input as well: `a + f(b)`, as in reversible networks.
        """
        reached = self._reached(left, right, call)
        sides: tuple[Side, Side] = 0, 1
        for side in sides:
            own, others = reached[side], reached[1 - side]
            mixes = call.inputs & others and mixing(self.recording, others - own)
            if mixes and self._is_stream((left, right)[side], call):
                return side
        return None

    def _reached(self, left: int, right: int, call: Call) -> list[Set[int]]:
        """The values that each operand was computed from, back to the inputs of `call`."""
        return [self.recording.reach_within(operand, call) for operand in (left, right)]

    def _is_stream(self, number: int, call: Call) -> bool:
        """Whether a value is an input of `call`, a residual sum, or a part of one of these."""
        if number in call.inputs or number in self.sums:
            return True
        value = self.recording.values[number]
        return (
            value.made_by in REARRANGES
            and bool(value.parents)
            and all(self._is_stream(parent, call) for parent in value.parents)
        )

    def _is_projection(self, shortcut: Set[int], branch: Set[int]) -> bool:
        """Whether `shortcut` is a projection of a single value from which `branch` starts too.

        - The shortcut must be computed from one value, and any parameters. The carry of a highway
          network, (1 - t(x)) * x, is computed from two values.
        - It must have fewer functions with weights than the branch, and no activation function.
          Otherwise one of two parallel branches could count as the projection of the other.
        - If it has weights and keeps the shape, the name of its module must say that it is a
          projection.
        - It must not be the other part of a split value, as in a coupling layer.
        - It must not contain a residual addition.
        """
        shared = shortcut & branch
        own, others = shortcut - shared, branch - shared
        values = self.recording.values
        parents = {p for value in own for p in values[value].parents if p in shared}
        starts = {p for p in parents if not isinstance(values[p].tensor, nn.Parameter)}
        convolutions = self._convolutions(own)
        if len(starts) != 1 or convolutions >= self._convolutions(branch):
            return False
        functions = self.recording.functions(own)
        if any(part in function for function in functions for part in ACTIVATIONS):
            return False
        if any(value in self.sums for value in own):
            return False
        (start,) = starts
        first = {values[value].made_by for value in others if start in values[value].parents}
        if not convolutions:
            return not (functions and set(functions) | first <= SPLITS)
        changes = values[start].tensor.shape != values[max(own)].tensor.shape
        return changes or any(part in name for name in self._names(own) for part in PROJECTIONS)

    def _names(self, values: Set[int]) -> list[str]:
        """The last parts of the names of the modules and parameters that made `values`."""
        calls = calls_during(self.recording.outermost, min(values), max(values))
        names = [call.name for call in calls if call.outputs and call.outputs <= values]
        names += self.recording.parameters(values)
        return [part for name in names for part in name.lower().split(".")[-3:]]

    def _convolutions(self, values: Set[int]) -> int:
        """How many of `values` were made by a function with weights."""
        functions = filter(is_mixing, self.recording.functions(values))
        return sum("pool" not in function for function in functions)


def mixing(recording: Recording, values: Set[int]) -> bool:
    """Whether one of `values` was made by a function that mixes its arguments."""
    return any(map(is_mixing, recording.functions(values)))


def is_mixing(function: str) -> bool:
    """Whether a function, by name, is one of those in `MIXES`."""
    return any(part in function for part in MIXES)
