"""Find CIFAR in a folder, in whichever of its public layouts it is."""

from pathlib import Path
from types import ModuleType

from stochastic_depth.data.cifar import binary, class_folders, parquet, pickles
from stochastic_depth.data.cifar.variants import Variant
from stochastic_depth.data.dataset import Images
from stochastic_depth.data.folders import archives, contents, unpacking
from stochastic_depth.errors import DataError

LAYOUTS = (pickles, binary, parquet, class_folders)


def find_cifar(root: Path, variant: Variant) -> tuple[ModuleType, Path] | None:
    """The first layout found in `root` or in a folder that its archives unpack to."""
    inside = (variant.pickle_folder, variant.binary_folder, "data", "plain_text", variant.name)
    for folder in (root, *(root / name for name in inside)):
        for layout in LAYOUTS:
            if layout.present(folder, variant):
                return layout, folder
    return None


def read_cifar(root: Path, variant: Variant) -> tuple[Images, Images]:
    """Training and test part.

    Raises:
        DataError: no layout found, or one that is damaged or not complete.
        MissingExtraError: a library that this layout needs is not installed.
    """
    found = find_cifar(root, variant)
    if found:
        layout, folder = found
        return layout.read(folder, variant)
    if packed := archives(root):
        raise DataError(
            f"{root}: holds {packed[0].name}, which is not unpacked: {unpacking(packed[0])}"
        )
    raise DataError(
        f"{root}: no {variant.name} found. Expected {variant.pickle_folder}/, "
        f"{variant.binary_folder}/, train-*.parquet with test-*.parquet, or "
        f"train/<class>/*.png with test/<class>/*.png; found {contents(root)}"
    )
