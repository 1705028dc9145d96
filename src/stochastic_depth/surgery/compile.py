"""`sd.compile_blocks`: compile the blocks one by one, so that gates cause no recompilation."""

import inspect
from typing import Any, TypeVar

import torch
from torch import nn

from stochastic_depth.errors import ApplyError
from stochastic_depth.surgery.applied import applied_to
from stochastic_depth.surgery.blocks import deferred_modules
from stochastic_depth.surgery.install import install, is_installed

Model = TypeVar("Model", bound=nn.Module)

_OPTION = "recompile_limit"
_LIMIT = {_OPTION: 32} if _OPTION in inspect.signature(torch.compile).parameters else {}
"""A `recompile_limit` above the compiler's own, 8, which subset gates exceed, as do four gates in
one block."""


def compile_blocks(model: Model, **options: Any) -> Model:
    """Compile every residual block of `model` with torch.compile, in place.

    Blocks are compiled when they first run. In training there is one graph for an open block and
    one for a closed block, and in evaluation one more. Blocks that look the same share their
    graphs. After that, no gates and no probabilities cause a compilation. Of a deferred block, the
    modules of its branch are compiled, once each.

    Gates are drawn, and everything outside the blocks runs, as before. The keys of the `state_dict`
    stay. Copies and pickles of the model are not compiled, nor is the model after `sd.remove`.
    `sd.summary` and `sd.verify` run the blocks uncompiled.

    More graphs are compiled for batches of a different size. With `granularity="unit"` a block of n
    additions has 2^n of them in training. With `gate="subset"` the number of samples changes: that
    takes six graphs in training, or a dozen if the batch size changes too.

    Args:
        model: a model that `sd.apply` was called on.
        options: options of `torch.compile`, such as `mode="max-autotune-no-cudagraphs"`.
            `fullgraph` is True when not given: the compiler then raises an error when a block runs
            that it cannot compile as a whole, and when blocks that look the same need more graphs
            than `recompile_limit`. With `fullgraph=False` such blocks run uncompiled.
            `recompile_limit` is 32 when not given; a PyTorch without that option uses
            `torch._dynamo.config.recompile_limit`, 8.

    Returns:
        `model`.

    Raises:
        ApplyError: when `sd.apply` was not called on `model`, or `model` is itself a block.

    Examples:
        >>> model = sd.models.CifarResNet(8)
        >>> handle = sd.apply(model)
        >>> model = sd.compile_blocks(model)  # the first steps compile
    """
    applied = applied_to(model)
    blocks = dict.fromkeys(found.module for found in applied.found if not found.is_deferred)
    if model in blocks:
        raise ApplyError(
            f"{type(model).__name__} is itself a block; compiling it would bypass the hook that "
            "draws its gates: put it into an nn.Sequential, and apply stochastic depth to that"
        )
    deferred = [found for found in applied.found if found.is_deferred]
    modules = dict.fromkeys(module for found in deferred for module in deferred_modules(found))
    for block in [*blocks, *modules]:
        if not is_installed(block) and "forward" not in vars(block):
            install(block, {})  # so that its graphs do not count towards the limit of other blocks
        block.compile(**{"fullgraph": True, **_LIMIT, **options})
    return model
