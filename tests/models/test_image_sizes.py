import pytest
import torch

from stochastic_depth.errors import UnsupportedBlockError
from stochastic_depth.models import CifarResNet, DenseNet, ImageNetResNet, VisionTransformer
from stochastic_depth.residual import Residual


def halves(model, side):
    """Run an image of `side` pixels; whether no addition had to stretch one of its sides."""
    shapes = []
    for block in model.modules():
        if isinstance(block, Residual):
            parts = block.branch, block.shortcut or torch.nn.Identity()
            block.register_forward_pre_hook(
                lambda _, args, parts=parts: shapes.append([part(args[0]).shape for part in parts])
            )
    model(torch.zeros(1, 3, side, side))
    return all(branch[2:] == shortcut[2:] for branch, shortcut in shapes)


@pytest.mark.parametrize(
    "model",
    [CifarResNet(8), DenseNet(10, growth=4), ImageNetResNet(50), VisionTransformer(1)],
    ids=lambda model: type(model).__name__,
)
@torch.no_grad()
def test_a_model_says_which_images_it_takes(model):
    model.eval()
    for side in range(1, 10):
        try:
            runs = halves(model, side)
        except (RuntimeError, UnsupportedBlockError):
            runs = False
        assert model.takes(side, side) == runs, side
