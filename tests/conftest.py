from collections.abc import Iterator

import pytest
import torch

# torchvision's wheels bring compiled operators only for CUDA builds of torch; with a CPU build
# it imports once the two operators it refers to are declared.
if torch.version.cuda is None:
    _operators = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On small tensors a second thread is only waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
