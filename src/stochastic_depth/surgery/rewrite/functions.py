"""What functions that a method calls are known to change, and what their results are part of."""

import ast
import inspect
from collections.abc import Iterator
from typing import Any

CONTAINER_CHANGES = frozenset(
    "append extend insert pop popitem popleft appendleft update setdefault remove clear".split()
)
"""Methods of lists and dictionaries that change them."""
VIEWS = frozenset(
    """
    view view_as view_as_real view_as_complex reshape reshape_as transpose permute t adjoint
    swapaxes swapdims movedim moveaxis flatten unflatten ravel squeeze unsqueeze expand expand_as
    broadcast_to broadcast_tensors atleast_1d atleast_2d atleast_3d chunk split split_with_sizes
    tensor_split hsplit vsplit dsplit unbind narrow select diagonal unfold as_strided contiguous to
    type type_as float half bfloat16 double int long bool cpu cuda detach conj real imag positive
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout get items values
    """.split()
)
"""Functions and methods whose result may be, share memory with, or be a part of what they get."""
CHOICES = frozenset("getattr next iter min max".split())
"""Built-in functions of which this is true, too."""
CONTAINERS = frozenset(
    "list tuple dict set zip enumerate reversed sorted map filter".split(),
)
"""Functions that return a new container of what they get."""
FACTS = frozenset("shape ndim dtype device requires_grad is_cuda layout itemsize".split())
"""Attributes of tensors that nothing can change in place."""
QUERIES = frozenset(
    "size dim ndimension numel nelement stride item tolist element_size is_floating_point".split()
)
"""Methods that change nothing of the object they belong to, whatever it is."""
WITH_EFFECTS = frozenset("print input open exec eval setattr delattr next iter __import__".split())
"""Built-in functions that are called for an effect."""


def changes_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and not value.value


def is_torchs(function: Any) -> bool:
    """Whether a function or class is PyTorch's, or Python's `math`."""
    name = getattr(function, "__module__", None) or ""
    return name.partition(".")[0] in ("torch", "math")


def method_of(cls: type, name: str) -> Any:
    try:
        return inspect.getattr_static(cls, name)
    except AttributeError:
        return None


def names_of(function: ast.expr) -> Iterator[str]:
    """The names in a dotted expression, outermost first; nothing for other expressions."""
    names = []
    while isinstance(function, ast.Attribute):
        names.append(function.attr)
        function = function.value
    if isinstance(function, ast.Name):
        yield function.id
        yield from reversed(names)
