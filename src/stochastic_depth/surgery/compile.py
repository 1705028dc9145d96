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
"""The compiler's own limit, 8, is less than subset gates need, or four gates in one block."""


def compile_blocks(model: Model, **options: Any) -> Model:
    """Compile every residual block of `model` with torch.compile, in place.

    Blocks are compiled when they first run: in training one graph for an open block and one for a
    closed, in evaluation one more. Blocks that look the same share them, and from then on no gates
    and no probabilities compile anything. Of a deferred block the modules of its branch are
    compiled, once each. Gates are drawn, and all that is outside of the blocks
    runs, as before; `state_dict` keys stay. Copies and pickles of the model are not compiled, nor
    is the model after `sd.remove`. `sd.summary` and `sd.verify` run the blocks uncompiled.

    More graphs come from batches of another size, from `granularity="unit"` (two for each addition
    of a block, multiplied), and from `gate="subset"`, whose number of samples changes: six in
    training, or a dozen where the size of batches changes too.

    Args:
        model: one that `sd.apply` was given.
        options: those of `torch.compile`, say `mode="max-autotune-no-cudagraphs"`. When not given,
            `fullgraph` is True: what cannot be compiled as a whole is an error of the compiler when
            the block first runs, and so are more graphs than `recompile_limit` for blocks that look
            the same. With `fullgraph=False` these run uncompiled. `recompile_limit` is 32 when not
            given, and before PyTorch had that option `torch._dynamo.config.recompile_limit`, 8.

    Returns:
        `model`.

    Raises:
        ApplyError: when `model` is not one that `sd.apply` was given, or is itself a block.

    Examples:
        >>> model = sd.models.CifarResNet(8)
        >>> handle = sd.apply(model)
        >>> model = sd.compile_blocks(model)  # the first steps compile
    """
    applied = applied_to(model)
    blocks = dict.fromkeys(found.module for found in applied.found if found.mechanism != "deferred")
    if model in blocks:
        raise ApplyError(
            f"{type(model).__name__} is itself a block, and compiled it would draw no gates: "
            "put it into an nn.Sequential, and apply stochastic depth to that"
        )
    deferred = [found for found in applied.found if found.mechanism == "deferred"]
    modules = dict.fromkeys(module for found in deferred for module in deferred_modules(found))
    for block in [*blocks, *modules]:
        if not is_installed(block) and "forward" not in vars(block):
            install(block, {})  # so that its graphs are not counted with those of other blocks
        block.compile(**{"fullgraph": True, **_LIMIT, **options})
    return model
