"""The handwritten digits that come with scikit-learn, 1,797 images of 8x8 pixels."""

from importlib.util import find_spec
from pathlib import Path

import torch

from stochastic_depth.data.dataset import Images, stratified
from stochastic_depth.errors import MissingExtraError
from stochastic_depth.extras import installing, require

CLASSES = tuple("0123456789")
TEST = 500


def read_digits() -> tuple[Images, Images]:
    """1,297 training and 500 test images, 8x8, grey, with their 17 levels spread over 0..255.

    Raises:
        MissingExtraError: when scikit-learn is not installed.
    """
    library = find_spec("sklearn")
    if library is None or library.origin is None:
        raise MissingExtraError(f"sklearn is not installed: {installing('train', 'sklearn')}")
    # scikit-learn's own function reads the same file, but imports SciPy first, which takes seconds.
    table = Path(library.origin).parent / "datasets" / "data" / "digits.csv.gz"
    rows = torch.from_numpy(require("numpy", "train").loadtxt(table, delimiter=","))
    pixels = rows[:, :64].mul(255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
    everything = Images(pixels, rows[:, 64].long())
    test, train = stratified(everything.labels, TEST, "digits", "test")
    return everything[train], everything[test]
