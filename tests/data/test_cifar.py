import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stochastic_depth.data import cifar
from stochastic_depth.data.cifar import CIFAR10, CIFAR100, read_cifar
from stochastic_depth.errors import DataError
from support.data_sets import (
    encode,
    table,
    write_binary,
    write_folders,
    write_parquet,
    write_pickles,
)

VARIANTS = {"cifar10": CIFAR10, "cifar100": CIFAR100}


@pytest.fixture(params=["cifar10", "cifar100"])
def small(request, pictures):
    """A small CIFAR: (variant, train pixels, train labels, test pixels, test labels)."""
    variant = VARIANTS[request.param]
    classes = len(variant.classes)
    n = 2 * classes
    shuffle = np.random.default_rng(1).permutation(n)
    return (
        variant,
        pictures(n),
        np.arange(n)[shuffle] % classes,
        pictures(classes, seed=1),
        np.arange(classes),
    )


def check(root, small, order=None):
    variant, train, train_labels, test, test_labels = small
    found, found_test = read_cifar(root, variant)
    order = np.arange(len(train)) if order is None else order
    np.testing.assert_array_equal(found.images, train[order].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(found.labels, train_labels[order])
    np.testing.assert_array_equal(found_test.images, test.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(found_test.labels, test_labels)


def test_the_classes_are_in_the_official_order():
    assert len(CIFAR10.classes) == 10
    assert CIFAR10.classes[3] == "cat"
    assert len(set(CIFAR100.classes)) == 100
    assert list(CIFAR100.classes) == sorted(CIFAR100.classes)
    assert (CIFAR100.classes[0], CIFAR100.classes[-1]) == ("apple", "worm")


def test_the_python_version_is_read_from_its_folder_or_the_one_around(small, tmp_path):
    write_pickles(tmp_path / small[0].pickle_folder, *small)
    check(tmp_path, small)
    check(tmp_path / small[0].pickle_folder, small)


def test_the_binary_version_is_read_from_its_folder_or_the_one_around(small, tmp_path):
    write_binary(tmp_path / small[0].binary_folder, *small)
    check(tmp_path, small)
    check(tmp_path / small[0].binary_folder, small)


@pytest.mark.parametrize("inside", [".", "data", "plain_text"])
def test_parquet_is_read_from_the_folder_or_those_inside(small, inside, tmp_path):
    write_parquet(tmp_path / inside, *small)
    check(tmp_path, small)


def test_parquet_may_name_its_column_image_and_hold_bare_bytes(small, tmp_path):
    write_parquet(tmp_path, *small, image="image", bare=True)
    check(tmp_path, small)


def test_parquet_is_decoded_once_while_its_files_are_the_same(small, tmp_path, monkeypatch):
    write_parquet(tmp_path, *small)
    decoded = []
    read = cifar.read_shard
    monkeypatch.setattr(cifar, "read_shard", lambda *args: decoded.append(args[0]) or read(*args))
    check(tmp_path, small)
    check(tmp_path, small)
    assert len(decoded) == 3
    path = tmp_path / "test-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes())
    check(tmp_path, small)
    assert len(decoded) == 6


def test_one_folder_per_class_is_read(small, tmp_path):
    write_folders(tmp_path, *small)
    (tmp_path / "train" / small[0].classes[0] / ".DS_Store").write_bytes(b"x")
    (tmp_path / "train" / ".cache").mkdir()
    check(tmp_path, small, order=np.argsort(small[2], kind="stable"))


@pytest.mark.parametrize("write", [write_pickles, write_binary, write_parquet])
def test_it_is_found_beside_the_class_folders_of_another_data_set(small, write, tmp_path):
    inside = {write_pickles: small[0].pickle_folder, write_binary: small[0].binary_folder}
    write(tmp_path / inside.get(write, "data"), *small)
    for part in ("train", "test"):
        (tmp_path / part / "roses").mkdir(parents=True)
    check(tmp_path, small)


@pytest.mark.parametrize("write", [write_pickles, write_binary])
def test_a_missing_file_is_named(small, write, tmp_path):
    folder = tmp_path / "files"
    write(folder, *small)
    victim = sorted(path for path in folder.iterdir())[-1]
    victim.unlink()
    with pytest.raises(DataError, match=f"files: {victim.name} missing"):
        read_cifar(folder, small[0])


def test_a_missing_or_foreign_shard_is_refused(small, tmp_path):
    write_parquet(tmp_path, *small)
    shard = tmp_path / "train-00000-of-00002.parquet"
    shard.rename(tmp_path / "train-00000-of-00003.parquet")
    with pytest.raises(DataError, match="expected the 3 shards"):
        read_cifar(tmp_path, small[0])
    (tmp_path / "train-00000-of-00003.parquet").unlink()
    with pytest.raises(DataError, match=r"expected the 2 shards .* found train-00001-of-00002"):
        read_cifar(tmp_path, small[0])
    (tmp_path / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(DataError, match="no train-"):
        read_cifar(tmp_path, small[0])


def test_a_pickle_with_other_content_is_refused(tmp_path, pictures):
    labels = np.arange(20) % 10
    write_pickles(tmp_path / "x", CIFAR10, pictures(20), labels, pictures(10), labels[:10])
    path = tmp_path / "x" / "data_batch_3"
    batch = pickle.loads(path.read_bytes())
    batch[b"labels"].pop()
    path.write_bytes(pickle.dumps(batch, 2))
    with pytest.raises(
        DataError, match=r"data_batch_3: MD5 checksum .*, or give the binary version"
    ):
        read_cifar(tmp_path / "x", CIFAR10)


@pytest.mark.parametrize("content", [b"", b"x" * 3072, b"\x0a" + bytes(3072)])
def test_a_binary_file_that_is_not_whole_or_not_of_this_variant_is_refused(
    content, tmp_path, pictures
):
    labels = np.arange(20) % 10
    write_binary(tmp_path / "x", CIFAR10, pictures(20), labels, pictures(10), labels[:10])
    (tmp_path / "x" / "data_batch_2.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"data_batch_2.bin(: \d+ bytes|, row 0: label 10)"):
        read_cifar(tmp_path / "x", CIFAR10)


def test_cifar_100_where_cifar_10_is_expected_is_refused(tmp_path, pictures):
    labels = np.arange(200) % 100
    write_parquet(tmp_path, CIFAR100, pictures(200), labels, pictures(100), labels[:100])
    with pytest.raises(DataError, match="columns img, fine_label, expected one named label"):
        read_cifar(tmp_path, CIFAR10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda good: table([good, b""], [0, 1]), "row 1: holds no bytes"),
        (lambda good: table([None, good], [0, 1]), "row 0: holds no bytes"),
        (lambda good: table([good, good[:60]], [0, 1]), "row 1: 60 bytes that are no readable"),
        (lambda good: table([good, b"<html>"], [0, 1]), "row 1: 6 bytes that are no readable"),
        (lambda good: table([good], [10]), "row 0: label 10, expected 0 to 9"),
        (lambda good: table([good], ["cat"]), "column label is string"),
        (lambda good: table([good, good], [1, None]), "with 1 nulls"),
        (lambda good: table([], pa.array([], pa.int64())), "holds no images"),
        (lambda good: table([good], [1], image="picture"), "expected one named img or image"),
        (lambda good: pa.table({"img": ["a.png"], "label": [1]}), "column img is string"),
    ],
)
def test_a_parquet_file_with_other_content_is_refused(make, message, tmp_path, pictures):
    labels = np.arange(20) % 10
    write_parquet(tmp_path, CIFAR10, pictures(20), labels, pictures(10), labels[:10])
    pq.write_table(make(encode(pictures(1)[0])), tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(DataError, match=f"test-00000-of-00001.parquet.*{message}"):
        read_cifar(tmp_path, CIFAR10)


@pytest.mark.parametrize(
    ("write", "source"),
    [
        (write_binary, r"data_batch_4\.bin"),
        (write_parquet, r"train-00000-of-00002\.parquet, .*train-00001-of-00002\.parquet"),
        (write_folders, r"files/train"),
    ],
)
def test_files_that_have_lost_some_images_are_named_with_both_numbers(
    write, source, tmp_path, pictures, monkeypatch
):
    """As if the published data set had 100 images, 10 of them for testing."""
    published, labels = (100, 10), np.arange(100) % 10
    monkeypatch.setattr(cifar, "PUBLISHED", published)
    parts = pictures(100), labels, pictures(10), labels[:10]
    write(tmp_path / "whole", CIFAR10, *parts)
    assert tuple(map(len, read_cifar(tmp_path / "whole", CIFAR10))) == published
    folder = tmp_path / "files"
    if write is write_binary:
        write(folder, CIFAR10, *parts)
        cut = folder / "data_batch_4.bin"
        cut.write_bytes(cut.read_bytes()[:-3073])
    else:
        write(folder, CIFAR10, *(part[:99] for part in parts))
    found = "19 images, published with 20" if write is write_binary else "99 .* with 100"
    with pytest.raises(DataError, match=f"{source}: {found}: fetch it again; .*--data.train N"):
        read_cifar(folder, CIFAR10)


@pytest.mark.parametrize("share", [0, 0.3, 0.999])
def test_a_truncated_parquet_file_is_refused(share, tmp_path, pictures):
    labels = np.arange(20) % 10
    write_parquet(tmp_path, CIFAR10, pictures(20), labels, pictures(10), labels[:10])
    path = tmp_path / "train-00001-of-00002.parquet"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=r"train-00001-of-00002.parquet: no readable parquet file"):
        read_cifar(tmp_path, CIFAR10)


def test_class_folders_of_other_classes_or_without_pictures_are_refused(tmp_path, pictures):
    labels = np.arange(20) % 10
    write_folders(tmp_path, CIFAR10, pictures(20), labels, pictures(10), labels[:10])
    (tmp_path / "test" / "cat" / "00003.png").rename(tmp_path / "test" / "cat" / "readme.txt")
    with pytest.raises(DataError, match="cat: holds no pictures"):
        read_cifar(tmp_path, CIFAR10)
    (tmp_path / "train" / "cat").rename(tmp_path / "train" / "tiger")
    with pytest.raises(DataError, match=r"train: .* missing cat, unexpected tiger"):
        read_cifar(tmp_path, CIFAR10)


def test_a_picture_that_is_none_is_named_by_its_path(tmp_path, pictures):
    labels = np.arange(20) % 10
    write_folders(tmp_path, CIFAR10, pictures(20), labels, pictures(10), labels[:10])
    (tmp_path / "train" / "ship" / "00008.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"ship/00008.png: holds no bytes"):
        read_cifar(tmp_path, CIFAR10)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("cifar-10-python.tar.gz", "tar -xf {archive} -C {folder}"),
        ("cifar10.zip", "python -m zipfile -e {archive} {folder}"),
    ],
)
def test_a_packed_archive_is_to_be_unpacked(name, command, tmp_path):
    archive = tmp_path / name
    archive.write_bytes(b"x")
    command = command.format(archive=archive, folder=tmp_path)
    for root in (tmp_path, archive):
        with pytest.raises(DataError, match=f"not unpacked: {command}"):
            read_cifar(root, CIFAR10)


def test_a_folder_without_any_layout_says_what_it_holds_and_what_is_expected(tmp_path):
    with pytest.raises(DataError, match=r"no cifar100 found.*cifar-100-python/.*an empty folder"):
        read_cifar(tmp_path, CIFAR100)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "more").mkdir()
    with pytest.raises(DataError, match=r"found more/, notes.txt"):
        read_cifar(tmp_path, CIFAR10)
