"""Find the weights to multiply so that the output of a branch is multiplied by p.

Every value of a forward pass gets an exponent e, which means that the value is to be multiplied by
p^e. The exponent of the branch's output is 1, and that of everything outside the branch is 0. Every
operation relates the exponents of its arguments to that of its result. The search starts at the
output and changes weights as near to it as possible. Where a changed value is used a second time,
as in squeeze and excitation, the change is cancelled there.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stochastic_depth.torch_private import TorchDispatchMode, tree_leaves, tree_map_only


@dataclass(eq=False)
class TracedValue:
    """A tensor of a forward pass: from the `state_dict`, an input or constant, or a result."""

    operation: str = ""
    """The name of the operation in PyTorch's schema, without namespace and without the "_" of
    operations in place; empty for a tensor that no operation has computed."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """The arguments by name, with values in place of tensors."""
    state: str = ""
    """Its name in the `state_dict`; empty for other tensors, and for integers, which cannot be
    multiplied by p."""
    single: bool = False
    """Whether it is less precise than float64."""
    is_fixed: bool = False
    """Whether it depends on nothing but the `state_dict`."""
    number: int = 0
    """How many values were recorded before it."""
    users: list["TracedValue"] = field(default_factory=list)
    """The values that were computed from it directly."""

    def operands(self) -> Iterator["TracedValue"]:
        """All values that it was computed from directly."""
        yield from operands(self.arguments)


def operands(arguments: object) -> Iterator[TracedValue]:
    """The values in nested containers."""
    return (leaf for leaf in tree_leaves(arguments) if isinstance(leaf, TracedValue))


def computed_for(branch: TracedValue, shortcuts: Sequence[TracedValue]) -> set[TracedValue]:
    """`branch`, and all results of operations that it was computed from and `shortcuts` were not.

    Results are visited from the last to the first, and only until those that remain are all
    ancestors of a shortcut: a network of many blocks is not walked once for each block.
    """
    found: set[TracedValue] = set()
    of_shortcut = {branch: False} | dict.fromkeys(shortcuts, True)
    ahead = [(-value.number, value) for value in of_shortcut]
    heapify(ahead)
    undecided = sum(not shared for shared in of_shortcut.values())
    while undecided:
        _, value = heappop(ahead)
        shared = of_shortcut[value]
        if not shared:
            found.add(value)
            undecided -= 1
        for operand in value.operands():
            if not operand.operation:
                continue
            if operand not in of_shortcut:
                of_shortcut[operand] = shared
                heappush(ahead, (-operand.number, operand))
                undecided += not shared
            elif shared and not of_shortcut[operand]:
                of_shortcut[operand] = True
                undecided -= 1
    return found


@dataclass(frozen=True)
class Scaled:
    """The output of a branch that was multiplied by the factor of its gate."""

    branch: TracedValue
    product: TracedValue
    result: Tensor


class Trace(TorchDispatchMode):
    """While entered, records every value, and the values that are multiplied by one of `factors`.

    Args:
        model: its `state_dict` gives names to tensors.
        factors: the factors of the gates, [] each.
    """

    def __init__(self, model: nn.Module, factors: Sequence[Tensor]) -> None:
        super().__init__()
        self.scaled: list[list[Scaled]] = [[] for _ in factors]
        """For each factor, in order of execution."""
        self.single = False
        """Whether anything was computed in less than float64."""
        self._factors = {id(factor): number for number, factor in enumerate(factors)}
        self._values: dict[int, TracedValue] = {}
        self._kept: list[Tensor] = []
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) not in self._values:
                can_change = tensor.is_floating_point() or tensor.is_complex()
                self._note(tensor, TracedValue(state=name if can_change else "", is_fixed=True))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        given = {a.name: arg for a, arg in zip(func._schema.arguments, args, strict=False)}
        given |= kwargs
        arguments = tree_map_only(Tensor, self._value, given)
        out: Any = func(*args, **kwargs)
        operation = func._schema.name.partition("::")[2].rstrip("_")
        # The first of several results is the value itself; the others are indices or statistics.
        for tensor in tree_leaves(out[0] if isinstance(out, tuple) else out):
            if isinstance(tensor, Tensor):
                made = self._note(tensor, TracedValue(operation, arguments))
                made.single = tensor.is_floating_point() and tensor.dtype != torch.float64
                self.single |= made.single
                made.is_fixed = all(operand.is_fixed for operand in made.operands())
                for operand in set(made.operands()):
                    operand.users.append(made)
        number = self._factors.get(id(given.get("other")))
        if operation == "mul" and number is not None and isinstance(out, Tensor):
            product = self._value(out)
            self.scaled[number].append(Scaled(arguments["self"], product, out.clone()))
        return out

    def _value(self, tensor: Tensor) -> TracedValue:
        return self._values.get(id(tensor)) or self._note(tensor, TracedValue())

    def _note(self, tensor: Tensor, value: TracedValue) -> TracedValue:
        value.number = len(self._kept)
        self._kept.append(tensor)  # so that no other tensor gets its id
        self._values[id(tensor)] = value
        return value


class Form(NamedTuple):
    """Says which arguments, given by name, a result is homogeneous in.

    The result is the product of `factors`, plus all of `addends`; without factors it is a sum. All
    other arguments must stay as they are. Factors are listed in the order in which they are best
    changed.
    """

    factors: tuple[str, ...] = ()
    addends: tuple[str, ...] = ()


ITSELF = Form(("self",))
FORMS: dict[str, Form] = {
    "convolution": Form(("weight", "input"), ("bias",)),
    "addmm": Form(("mat2", "mat1"), ("self",)),
    "baddbmm": Form(("batch2", "batch1"), ("self",)),
    "mm": Form(("mat2", "self")),
    "bmm": Form(("mat2", "self")),
    "_grouped_mm": Form(("mat2", "self"), ("bias",)),
    "mv": Form(("vec", "self")),
    "dot": Form(("tensor", "self")),
    "mul": Form(("other", "self")),
    "div": ITSELF,
    "add": Form(addends=("self", "other")),
    "sub": Form(addends=("self", "other")),
    "where": Form(addends=("self", "other")),
    "cat": Form(addends=("tensors",)),
    "stack": Form(addends=("tensors",)),
    "index_add": Form(addends=("self", "source")),
    "scatter_add": Form(addends=("self", "src")),
    "index_put": Form(addends=("self", "values")),
    "copy": Form(("src",)),
    "embedding": Form(("weight",)),
    "grid_sampler_2d": Form(("input",)),
    "grid_sampler_3d": Form(("input",)),
    "_weight_norm_interface": Form(("g",)),
    "_prelu_kernel": ITSELF,
    "zeros": Form(),
    "zeros_like": Form(),
    "new_zeros": Form(),
}
"""Forms by the operation's name in PyTorch's schema."""
FORMS |= dict.fromkeys(
    "view _unsafe_view reshape permute transpose t expand slice select squeeze unsqueeze clone "
    "_to_copy alias detach unbind split split_with_sizes chunk roll flip index index_select gather "
    "unfold as_strided im2col col2im pixel_shuffle pixel_unshuffle reflection_pad1d "
    "reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d "
    "cudnn_grid_sampler upsample_nearest1d upsample_nearest3d upsample_linear1d "
    "upsample_trilinear3d _unsafe_index view_as_real view_as_complex _fft_r2c _fft_c2r _fft_c2c "
    "mean sum cumsum neg amax relu leaky_relu avg_pool1d avg_pool2d avg_pool3d "
    "_adaptive_avg_pool2d _adaptive_avg_pool3d max_pool2d_with_indices max_pool3d_with_indices "
    "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d diagonal movedim lift_fresh".split(),
    ITSELF,
)
NORMALISATION = ("batch_norm", "layer_norm", "group_norm", "rms_norm")
ATTENTION = "_scaled_dot_product"


def form_of(value: TracedValue) -> Form | None:
    """The form of the operation that computed `value`; None where it is not homogeneous."""
    operation, arguments = value.operation, value.arguments
    if operation == "constant_pad_nd" and not arguments.get("value"):
        return ITSELF
    if operation == "masked_fill" and arguments.get("value") == 0:
        return ITSELF
    if any(part in operation for part in NORMALISATION):  # by any backend
        return Form(("weight",), ("bias",)) if arguments.get("weight") is not None else None
    if operation.startswith(ATTENTION):
        return Form(("value",))
    form = FORMS.get(operation)
    if form is not None and any(_is_number(arguments.get(name)) for name in form.addends):
        return None
    return form


def factors(value: TracedValue, form: Form) -> list[TracedValue]:
    """The tensors that are multiplied, in the order in which they are best changed."""
    return [v for name in form.factors for v in operands(value.arguments.get(name))]


def addends(value: TracedValue, form: Form) -> list[TracedValue]:
    """The tensors that are added."""
    return [v for name in form.addends for v in operands(value.arguments.get(name))]


def others(value: TracedValue, form: Form) -> Iterator[TracedValue]:
    """The tensors that must stay as they are."""
    for name, argument in value.arguments.items():
        if name not in (*form.factors, *form.addends):
            yield from operands(argument)


def _is_number(argument: Any) -> bool:
    return isinstance(argument, int | float) and argument != 0


Exponents = dict[TracedValue, int]


class Inexact(Exception):
    """Raised when there are no weights that can be multiplied; the message gives the reason."""


def exponents(scaled: Sequence[Scaled]) -> dict[str, int]:
    """The exponents of the tensors that are to be multiplied, by name in the `state_dict`.

    Args:
        scaled: the outputs of all branches that share one factor.

    Raises:
        Inexact: when no weights can be multiplied.
    """
    found: Exponents = {}
    inside: set[TracedValue] = set()
    ends: set[TracedValue] = set()
    for each in scaled:
        shortcuts = [v for user in each.product.users for v in user.operands()]
        shortcuts = [v for v in shortcuts if v is not each.product]
        branch, whole = _branch(each.branch, computed_for(each.branch, shortcuts))
        inside |= computed_for(branch, shortcuts)
        ends |= {each.product, *whole}
        found = _demand(branch, 1, found, inside)
    for value in list(found):
        _settle(value, found, inside, ends)
    return {value.state: e for value, e in found.items() if value.state and e}


def _branch(value: TracedValue, inside: set[TracedValue]) -> tuple[TracedValue, list[TracedValue]]:
    """The value that is added to the shortcut; for `(x + f) - x`, f and also the sum."""
    if value.operation == "sub":
        whole, shortcut = value.arguments["self"], value.arguments["other"]
        if shortcut not in inside and isinstance(whole, TracedValue) and whole.operation == "add":
            parts = [part for part in whole.operands() if part is not shortcut]
            if len(parts) == 1:
                return parts[0], [whole, value]
    return value, []


def _demand(value: TracedValue, e: int, found: Exponents, inside: set[TracedValue]) -> Exponents:
    """`found`, extended so that the exponent of `value` is e.

    Args:
        inside: the values of the branch. Only these and the tensors of the `state_dict` may change.

    Raises:
        Inexact: when that is not possible.
    """
    if value in found:
        if found[value] != e:
            raise Inexact(f"{_named(value)} would have to change in two ways")
        return found
    if value.state:
        return {**found, value: e}
    if not value.operation or (not value.is_fixed and value not in inside):
        raise Inexact("no weight is multiplied into it linearly")
    form = form_of(value)
    if form is None:
        raise Inexact(f"it passes through {_named(value)}, which is not linear")
    found = {**found, value: e}
    for addend in addends(value, form):
        found = _demand(addend, e, found, inside)
    reasons: list[str] = []
    choices = sorted(factors(value, form), key=lambda f: (f not in found, not f.is_fixed))
    for factor in choices:
        try:
            return _demand(factor, e, found, inside)
        except Inexact as error:
            reasons.append(str(error))
    if choices:
        raise Inexact(reasons[-1])
    return found


def _settle(
    origin: TracedValue, found: Exponents, inside: set[TracedValue], ends: set[TracedValue]
) -> None:
    """Follow a changed value to all of its uses, and compensate for the change there.

    Raises:
        Inexact: when a use cannot be compensated.
    """
    ahead = [origin]
    while ahead:
        value = ahead.pop()
        for user in value.users:
            if user in ends:
                continue
            before = set(found)
            if user not in inside or not _agrees(user, value, found):
                raise Inexact(f"{_named(origin)} is also used by {_named(user)}")
            ahead += [new for new in found if new not in before]


def _agrees(user: TracedValue, value: TracedValue, found: Exponents) -> bool:
    """Whether the exponents around `user` agree; sets the missing one if it is free."""
    form = form_of(user)
    if form is None or value in others(user, form):
        return False
    multiplied = factors(user, form)
    product = sum(found.get(factor, 0) for factor in multiplied)
    wanted = {found.get(addend, 0) for addend in addends(user, form)}
    if user in found or wanted - {0} or not multiplied:
        right = found.get(user, 0)
        return not wanted - {right} and (not multiplied or product == right)
    if product == 0:
        return True
    free = [factor for factor in multiplied if factor not in found and factor.is_fixed]
    if free:
        found.update(_demand(free[0], -product, found, set()))
    else:
        found[user] = product
    return True


def _named(value: TracedValue) -> str:
    return repr(value.state) if value.state else value.operation or "an input"
