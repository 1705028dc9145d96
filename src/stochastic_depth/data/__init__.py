"""A data set in one of its public layouts, as tensors in memory or as a loader of batches."""

from stochastic_depth.data.batching import (
    Batches,
    Shard,
    TensorBatches,
    crop_and_flip,
    draw_crops,
    normalise,
)
from stochastic_depth.data.dataset import DataSet, Images
from stochastic_depth.data.folder_batches import FolderBatches
from stochastic_depth.data.loading import batches, load

__all__ = [
    "Batches",
    "DataSet",
    "FolderBatches",
    "Images",
    "Shard",
    "TensorBatches",
    "batches",
    "crop_and_flip",
    "draw_crops",
    "load",
    "normalise",
]
