"""The 1,797 handwritten digits that come with scikit-learn (Alpaydin and Kaynak, UCI, 1998)."""

import torch

from stochastic_depth.data.dataset import Images
from stochastic_depth.data.split import stratified
from stochastic_depth.extras import require

CLASSES = tuple("0123456789")
TEST = 500


def read_digits() -> tuple[Images, Images]:
    """1,297 training and 500 test images, 8x8, grey, their 17 levels spread over 0..255.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    digits = require("sklearn.datasets", "train").load_digits()
    pixels = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)
    everything = Images(pixels[:, None], torch.from_numpy(digits.target).long())
    test, train = stratified(everything.labels, TEST, "digits", "test")
    return everything[train], everything[test]
