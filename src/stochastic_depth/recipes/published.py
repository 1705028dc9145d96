"""What was published for the recipes: what our runs are held against."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One published result."""

    error: float
    """Percent: the test error; of ImageNet, the validation error."""
    source: str
    seconds: float | None = None
    """Of training, on the authors' GPU."""


PAPER = "Huang et al. 2016"
DENSENET = "Huang et al. 2017"


def _time(hours: int, minutes: int) -> float:
    return 60.0 * (60 * hours + minutes)


PUBLISHED = {
    "cifar10-resnet110": Published(5.23, PAPER, _time(15, 7)),
    "cifar10-resnet110-constant": Published(6.41, PAPER, _time(20, 42)),
    "cifar100-resnet110": Published(24.58, PAPER, _time(15, 20)),
    "cifar100-resnet110-constant": Published(27.22, PAPER, _time(20, 51)),
    "svhn-resnet152": Published(1.75, PAPER, _time(25, 33)),
    "svhn-resnet152-constant": Published(2.01, PAPER, _time(33, 43)),
    "cifar10-resnet1202": Published(4.91, PAPER),
    "cifar10-resnet1202-constant": Published(6.72, PAPER),
    "imagenet-resnet152": Published(23.38, PAPER),
    "imagenet-resnet152-constant": Published(23.06, PAPER),
    "cifar10-densenet-bc100": Published(4.51, DENSENET),
    "cifar100-densenet-bc100": Published(22.27, DENSENET),
    "cifar10-densenet-bc190": Published(3.46, DENSENET),
}
"""By the name of the recipe."""
