"""Make torchvision importable.

Its wheels bring compiled operators only for CUDA builds of torch; with a CPU build it imports once
the two operators it refers to are declared.
"""

import torch

if torch.version.cuda is None:
    _operators = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
