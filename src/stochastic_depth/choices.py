"""The values that arguments and options may have, by name. This module does not need PyTorch."""

from typing import Literal

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
