import pytest
import torch

from stochastic_depth.data import Share, batches
from support.data_sets import write_imagenet


def test_shares_are_all_of_a_batch_and_differ_by_one_image_at_most():
    for images in range(40):
        for ranks in range(1, 9):
            parts = [range(images)[Share(rank, ranks).of(images)] for rank in range(ranks)]
            assert [image for part in parts for image in part] == list(range(images))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("name", ["digits", "imagenet"])
def test_the_shares_of_every_batch_make_up_the_batch(name, tmp_path):
    root = None
    if name == "imagenet":
        pytest.importorskip("torchvision", reason="needs torchvision")
        write_imagenet(tmp_path)
        root = tmp_path
    size = {"size": 16} if name == "imagenet" else {}
    whole, *shares = (
        batches(name, root, batch=8, seed=0, device="cpu", augment=True, share=share, **size)
        for share in (Share(), Share(0, 3), Share(1, 3), Share(2, 3))
    )
    assert len({images.fingerprint for images in (whole, *shares)}) == 1
    for expected, *parts in zip(
        whole.train(1, start=1), *(share.train(1, start=1) for share in shares), strict=True
    ):
        for of_all, *of_each in zip(expected, *parts, strict=True):
            assert torch.equal(torch.cat(of_each), of_all)
    labels = torch.cat([labels for _, labels in whole.evaluate("test")])
    seen = [labels for share in shares for _, labels in share.evaluate("test")]
    assert torch.equal(torch.cat(seen).bincount(), labels.bincount())
