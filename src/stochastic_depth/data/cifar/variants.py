"""What differs between CIFAR-10 and CIFAR-100 (Krizhevsky, 2009)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stochastic_depth.data.dataset import Images
from stochastic_depth.errors import DataError

SIZE = (32, 32)

# The official order: a name's position is its label.
NAMES_10 = "airplane automobile bird cat deer dog frog horse ship truck"
NAMES_100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house
kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree
plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew
skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank
telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf
woman worm
"""


@dataclass(frozen=True)
class Variant:
    """Names in the published files; `label_columns` in the order in which they are tried."""

    name: str
    classes: tuple[str, ...]
    pickle_folder: str
    pickle_files: tuple[tuple[str, ...], tuple[str, ...]]
    binary_folder: str
    binary_files: tuple[tuple[str, ...], tuple[str, ...]]
    binary_label_bytes: int
    label_columns: tuple[str, ...]

    def images(self, pixels: Tensor, labels: Tensor, source: Path) -> Images:
        """Images of this variant, after a look at the labels.

        pixels: uint8 [n, 3, 32, 32]; labels: integers [n]; source: the file they came from.

        Raises:
            DataError: no images, another number of labels, or a label out of range.
        """
        if len(pixels) == 0:
            raise DataError(f"{source}: holds no images: fetch it again")
        if labels.shape != pixels.shape[:1]:
            raise DataError(
                f"{source}: {len(pixels)} images and labels of shape {list(labels.shape)}, "
                "expected one label for each image: fetch it again"
            )
        labels = labels.long()
        wrong = ((labels < 0) | (labels >= len(self.classes))).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"{source}, row {row}: label {int(labels[row])}, expected 0 to "
                f"{len(self.classes) - 1}: these are not the labels of {self.name}"
            )
        return Images(pixels, labels)


def join(parts: list[Images]) -> Images:
    return Images(
        torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])
    )


CIFAR10 = Variant(
    name="cifar10",
    classes=tuple(NAMES_10.split()),
    pickle_folder="cifar-10-batches-py",
    pickle_files=(tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",)),
    binary_folder="cifar-10-batches-bin",
    binary_files=(tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",)),
    binary_label_bytes=1,
    label_columns=("label", "labels"),
)

CIFAR100 = Variant(
    name="cifar100",
    classes=tuple(NAMES_100.split()),
    pickle_folder="cifar-100-python",
    pickle_files=(("train",), ("test",)),
    binary_folder="cifar-100-binary",
    binary_files=(("train.bin",), ("test.bin",)),
    # The first of the two label bytes is the coarse label.
    binary_label_bytes=2,
    label_columns=("fine_label", "fine_labels"),
)
