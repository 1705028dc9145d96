import pytest
import torch

from stochastic_depth.data import Shard, batches
from support.data_sets import write_imagenet


def test_shards_are_all_of_a_batch_and_differ_by_one_image_at_most():
    for images in range(40):
        for ranks in range(1, 9):
            parts = [range(images)[Shard(rank, ranks).slice_of(images)] for rank in range(ranks)]
            assert [image for part in parts for image in part] == list(range(images))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("name", ["digits", "imagenet"])
def test_the_shards_of_every_batch_make_up_the_batch(name, tmp_path):
    root = None
    if name == "imagenet":
        pytest.importorskip("torchvision", reason="needs torchvision")
        write_imagenet(tmp_path)
        root = tmp_path
    size = {"size": 16} if name == "imagenet" else {}
    whole, *shards = (
        batches(name, root, batch=8, seed=0, device="cpu", augment=True, shard=shard, **size)
        for shard in (Shard(), Shard(0, 3), Shard(1, 3), Shard(2, 3))
    )
    assert len({images.fingerprint for images in (whole, *shards)}) == 1
    for expected, *parts in zip(
        whole.train(1, start=1), *(shard.train(1, start=1) for shard in shards), strict=True
    ):
        for batch_of_all, *batches_of_shards in zip(expected, *parts, strict=True):
            assert torch.equal(torch.cat(batches_of_shards), batch_of_all)
    labels = torch.cat([labels for _, labels in whole.evaluate("test")])
    seen = [labels for shard in shards for _, labels in shard.evaluate("test")]
    assert torch.equal(torch.cat(seen).bincount(), labels.bincount())
