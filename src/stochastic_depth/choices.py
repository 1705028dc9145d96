"""The values that arguments and options may have, by name. This module does not need PyTorch."""

from typing import Literal

DataName = Literal["digits", "cifar10", "cifar100", "svhn", "imagenet", "folder"]
"""The data sets of `data.sources`."""

Scaling = Literal["bilinear", "area"]
"""How a picture is scaled to the size that a network takes: by Pillow's bilinear filter, or, where
it becomes smaller, by averaging areas."""

GateKind = Literal["batch", "sample", "subset"]
"""One coin for each block and mini-batch (the paper); or one for each block and sample, by which
the branch is masked ("sample") or runs on the drawn samples only ("subset")."""

Scale = Literal["inference", "training", "none"]
"""Where the expectation is corrected: times p_l in evaluation (the paper), divided by p_l in
training, or nowhere, because closed branches run forward."""

Closed = Literal["skipped", "forward-only"]
"""What a closed block saves: all of its branch (the paper), or only its backward pass and
memory."""

SkippedPolicy = Literal["paper", "freeze"]
"""The gradient of a skipped block's parameters: zero, so that the optimizer still moves them, or
None."""

Initialisation = Literal["zero-gain", "he"]
"""The initial state of a residual network: every block equals its shortcut, or the original papers'
initialisation."""

RuleName = Literal["linear", "uniform", "constant"]
"""A survival rule in a configuration: linear decay, one probability for all blocks, or no
stochastic depth."""

CheckpointName = Literal["best", "last"]
"""The checkpoint of the lowest validation error, or the newest."""

PrecisionOption = Literal["auto", "float32", "bfloat16"]
"""The precision of convolutions and matrix products, if it is not chosen automatically."""

EngineOption = Literal["auto", "eager", "compiled", "program"]
"""How training steps are taken: by autograd, by autograd with compiled blocks, or by the block
program; if it is not chosen automatically."""

Granularity = Literal["block", "unit"]
"""Whether all residual additions of a block share a gate, or each has its own."""

SweepKind = Literal["survival", "depth", "gates"]
"""What a sweep varies: p_L and rules, p_L and depths, or ways of gating."""
