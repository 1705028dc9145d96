"""A small GPT of x-transformers, whose layers are left out in a Python loop, and so do save."""

import torch

from stochastic_depth.bench.peers.names import CONSTANT, OURS
from stochastic_depth.bench.plain import copy_weights
from stochastic_depth.bench.workload import Step, training_step
from stochastic_depth.errors import ApplyError
from stochastic_depth.models.published import library
from stochastic_depth.randomness import generator
from stochastic_depth.surgery import apply
from stochastic_depth.survival import Uniform
from stochastic_depth.train.execution import Execution

THEIRS = "x-transformers layer_dropout"
TOKENS, DIMENSION, LAYERS, HEADS = 1000, 384, 6, 6
"""The vocabulary; width; layers, each of an attention and a feed-forward unit; heads."""


def x_transformer_peers(
    rate: float, batch: int, length: int, execution: Execution
) -> tuple[dict[str, Step], dict[str, str]]:
    """A training step of each peer, all from the same weights, and why others are missing.

    Args:
        rate: the drop rate of every unit.
        batch: texts a step.
        length: tokens a text.

    Raises:
        MissingExtraError: without x-transformers.
    """
    library("x_transformers")
    texts = torch.randint(TOKENS, (batch, length + 1), generator=generator("bench"))
    inputs, labels = texts[:, :-1], texts[:, 1:]
    constant, theirs, ours = _decoder(0.0, length), _decoder(rate, length), _decoder(0.0, length)
    missing = {}
    steps = {}
    for name, model in ((CONSTANT, constant), (THEIRS, theirs), (OURS, ours)):
        copy_weights(constant, model)
        try:
            if model is ours:
                apply(model, Uniform(1 - rate), example=inputs[:2], granularity="unit")
        except ApplyError as error:
            missing[name] = str(error).splitlines()[0]
            continue
        steps[name] = training_step(model, inputs, labels, execution)
    return steps, missing


def _decoder(layer_dropout: float, length: int) -> torch.nn.Module:
    package = library("x_transformers")
    layers = package.Decoder(dim=DIMENSION, depth=LAYERS, heads=HEADS, layer_dropout=layer_dropout)
    return package.TransformerWrapper(num_tokens=TOKENS, max_seq_len=length, attn_layers=layers)
