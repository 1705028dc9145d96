"""In what an operation is homogeneous: which of its arguments times p make its result times p.

p is positive, so that an operation which only compares (ReLU, max pooling) is homogeneous too.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from stochastic_depth.export.tracing import Value, operands


class Form(NamedTuple):
    """A result that is a product of `factors`, plus all of `addends`, by names of arguments.

    Without factors it is a sum. Whatever else an operation is given must stay as it is. Factors
    are in the order in which they are best changed.
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
    "_weight_norm_interface": Form(("g",)),
    "_prelu_kernel": ITSELF,
    "zeros": Form(),
    "zeros_like": Form(),
    "new_zeros": Form(),
}
"""By the operation's name in PyTorch's schema."""
FORMS |= dict.fromkeys(
    "view _unsafe_view reshape permute transpose t expand slice select squeeze unsqueeze clone "
    "_to_copy alias detach unbind split split_with_sizes chunk roll flip index index_select gather "
    "unfold as_strided im2col col2im pixel_shuffle pixel_unshuffle reflection_pad2d "
    "replication_pad2d view_as_real view_as_complex _fft_r2c _fft_c2r _fft_c2c mean sum cumsum neg "
    "amax relu leaky_relu avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d "
    "_adaptive_avg_pool3d max_pool2d_with_indices max_pool3d_with_indices upsample_nearest2d "
    "upsample_bilinear2d upsample_bicubic2d diagonal movedim lift_fresh grid_sampler_2d".split(),
    ITSELF,
)
NORMALISATION = ("batch_norm", "layer_norm", "group_norm", "rms_norm")
ATTENTION = "_scaled_dot_product"


def form_of(value: Value) -> Form | None:
    """How the operation that made `value` is homogeneous; None where it is not."""
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


def factors(value: Value, form: Form) -> list[Value]:
    """The tensors that are multiplied, those first that are best changed."""
    return [v for name in form.factors for v in operands(value.arguments.get(name))]


def addends(value: Value, form: Form) -> list[Value]:
    """The tensors that are added."""
    return [v for name in form.addends for v in operands(value.arguments.get(name))]


def others(value: Value, form: Form) -> Iterator[Value]:
    """The tensors that must stay as they are."""
    for name, argument in value.arguments.items():
        if name not in (*form.factors, *form.addends):
            yield from operands(argument)


def _is_number(argument: Any) -> bool:
    return isinstance(argument, int | float) and argument != 0
