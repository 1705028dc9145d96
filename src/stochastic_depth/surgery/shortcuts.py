"""Which operand of an addition is its shortcut, if the addition is residual."""

from collections.abc import Container

from stochastic_depth.surgery.edits import Side
from stochastic_depth.surgery.trace import Call, Recording

MIXES = (
    "linear",
    "conv",
    "mm",
    "matmul",
    "einsum",
    "attention",
    "pool",
    "fft",
    "lstm",
    "gru",
    "rnn",
    "unseen",
)
"""Parts of the names of functions of which a branch has at least one: what only adds to, scales or
bends a value (an activation written out, a rotary embedding, a normalisation) is no branch."""


ACTIVATIONS = ("relu", "gelu", "silu", "swish", "sigmoid", "tanh", "elu", "mish", "softmax", "glu")
"""Parts of the names of functions that no projection shortcut has."""


SPLITS = {"chunk", "split", "unbind", "__getitem__", "narrow", "tensor_split"}


REARRANGES = SPLITS | {"view", "reshape", "permute", "transpose", "contiguous", "flatten", "clone"}
REARRANGES |= {"unflatten", "squeeze", "unsqueeze", "to", "float", "rearrange", "movedim", "select"}
"""Names of functions that give what they are given in another form, or a part of it."""


PROJECTIONS = ("shortcut", "skip", "down", "proj", "ident", "res")
"""Parts of the names of modules that project what could have passed by as it is."""


class Shortcuts:
    """Judges additions of a watched forward pass.

    Args:
        sums: the results of residual additions until now.
    """

    def __init__(self, recording: Recording, sums: Container[int]) -> None:
        self.recording, self.sums = recording, sums

    def side(self, left: int, right: int, of: list[set[int]], call: Call) -> Side | None:
        """Which operand is the shortcut, if the addition is residual."""
        if left in of[1]:
            return "left"
        if right in of[0]:
            return "right"
        if not (call.inputs & of[0] and call.inputs & of[1]):
            return None
        if (left in self.sums) != (right in self.sums):  # x + f(x) + g(x)
            return "left" if left in self.sums else "right"
        made = [sum(value >= call.began for value in values) for values in of]
        if made[0] < made[1] and self._is_projection(of[0], of[1]):
            return "left"
        if made[1] < made[0] and self._is_projection(of[1], of[0]):
            return "right"
        return None

    def part(self, left: int, right: int, of: list[set[int]], call: Call) -> Side | None:
        """Which operand is a part of what `call` was given, or one of its streams, as it came.

        The other one mixes what it was given too: `a + f(b)`, as in reversible networks.
        """
        sides: tuple[Side, Side] = "left", "right"
        pairs = zip(sides, (left, right), of, reversed(of), strict=True)
        for side, number, own, other in pairs:
            mixes = call.inputs & other and self.mixes(other - own)
            if mixes and self._is_stream(number, call):
                return side
        return None

    def _is_stream(self, number: int, call: Call) -> bool:
        """Whether a value is an input, a residual sum, or a part of one of these."""
        if number in call.inputs or number in self.sums:
            return True
        value = self.recording.values[number]
        return (
            value.made_by in REARRANGES
            and bool(value.parents)
            and all(self._is_stream(parent, call) for parent in value.parents)
        )

    def _is_projection(self, shortcut: set[int], branch: set[int]) -> bool:
        """Whether one operand is a projection of a single value from which the other starts too.

        A highway's carry, (1 - t(x)) * x, is computed from two values. A projection convolves less
        often than the branch and has no activation function: parallel branches are none of each
        other. One that does not change the shape has a name that says so. A part of a value is no
        shortcut for a branch that starts from the other part (a coupling layer). What adds a branch
        of its own is none.
        """
        shared = shortcut & branch
        own, others = shortcut - shared, branch - shared
        values = self.recording.values
        starts = {p for value in own for p in values[value].parents if p in shared}
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

    def _names(self, values: set[int]) -> list[str]:
        """The last parts of the names of the modules that ran for `values`, and of parameters."""
        parents = {p for value in values for p in self.recording.values[value].parents}
        names = [*self.recording.modules(values, 0), *self.recording.parameters(parents)]
        return [part for name in names for part in name.lower().split(".")[-3:]]

    def mixes(self, values: set[int]) -> list[str]:
        """The functions among those that made `values` of which a branch has at least one."""
        functions = self.recording.functions(values)
        return list(filter(is_mixing, functions))

    def _convolutions(self, values: set[int]) -> int:
        """How many of `values` were made by a function with weights."""
        return sum("pool" not in function for function in self.mixes(values))


def is_mixing(function: str) -> bool:
    return any(part in function for part in MIXES)
