"""The command line, where torchvision's wheel is one for GPUs; see tests/conftest.py."""

import sys

import torch

if torch.version.cuda is None:
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from stochastic_depth.cli import main

if __name__ == "__main__":
    sys.exit(main())
