"""The choices that have names, in arguments and in options; nothing here needs PyTorch."""

from typing import Literal

GateKind = Literal["batch", "sample", "subset"]
"""One coin a block and mini-batch (the paper), or one a block and sample: masked or selected."""

Scale = Literal["inference", "training", "none"]
"""Where the expectation is corrected: times p_l in evaluation (the paper), over p_l in training, or
nowhere, because a closed branch runs forward."""

Closed = Literal["skipped", "forward-only"]
"""What a closed block saves: all of its branch (the paper), or only backward pass and memory."""

SkippedPolicy = Literal["paper", "freeze"]
"""A skipped block's parameters: gradient zero, so the optimizer still moves them, or None."""

Initialisation = Literal["zero-gain", "he"]
"""How a residual network starts: every block as its shortcut, or as in the original papers."""
