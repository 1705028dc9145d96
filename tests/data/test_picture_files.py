import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stochastic_depth.data import picture_files
from stochastic_depth.data.cifar import CIFAR10, read_part
from stochastic_depth.data.picture_files import BLOCK, content_hash, fingerprint, scan
from stochastic_depth.errors import DataError


@pytest.fixture
def root(tmp_path):
    """Two classes of three pictures, uncompressed."""
    for label in ("cats", "dogs"):
        (tmp_path / "train" / label).mkdir(parents=True)
        for number in range(3):
            picture(tmp_path / "train" / label / f"{number}.bmp", number)
    return tmp_path


def picture(path, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def fingerprint_of(root):
    classes, samples = scan(root / "train")
    return fingerprint(root, classes, {"train": samples})


def test_the_fingerprint_sees_one_pixel_of_a_file_that_keeps_its_size(root):
    before, path = fingerprint_of(root), root / "train" / "dogs" / "1.bmp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert fingerprint_of(root) != before


def test_a_copy_has_the_same_fingerprint(root):
    shutil.copytree(root / "train", root / "copy" / "train", copy_function=shutil.copyfile)
    assert fingerprint_of(root / "copy") == fingerprint_of(root)


def test_of_large_data_sets_an_equal_share_of_every_picture_is_compared(root, monkeypatch):
    monkeypatch.setattr(picture_files, "COMPARED", 100)
    before, path = fingerprint_of(root), root / "train" / "cats" / "0.bmp"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert fingerprint_of(root) != before


def test_what_is_read_of_a_large_file_is_spread_evenly_over_it(tmp_path):
    path, size, blocks = tmp_path / "large", 40 * BLOCK, 5
    starts = [round(number * (size - BLOCK) / (blocks - 1)) for number in range(blocks)]
    path.write_bytes(bytes(size))
    before = content_hash(path, blocks * BLOCK)
    for start in starts:
        for position, seen in ((start, True), (start + BLOCK - 1, True), (start + BLOCK, False)):
            content = bytearray(size + 1)[:size]
            if position < size:
                content[position] = 1
                path.write_bytes(content)
                assert (content_hash(path, blocks * BLOCK) != before) == seen
                assert content_hash(path, size) != before


@pytest.mark.parametrize("name", [".DS_Store", "._1.png", ".1.png", "notes.txt", "Thumbs.db"])
def test_hidden_files_and_files_of_other_kinds_are_left_out(root, name):
    expected = scan(root / "train")
    (root / "train" / "cats" / name).write_bytes(b"\0\5\x16\7")
    assert scan(root / "train") == expected


def test_hidden_folders_are_left_out(root):
    expected = scan(root / "train")
    for folder in (".ipynb_checkpoints", "cats/.thumbnails"):
        (root / "train" / folder).mkdir()
        picture(root / "train" / folder / "0.png", 0)
    assert scan(root / "train") == expected


@pytest.mark.parametrize("suffix", [".gif", ".tiff", ".TIF", ".HEIC", ".avif"])
def test_a_picture_in_another_format_is_named_with_the_formats(root, suffix):
    (path := root / "train" / "cats" / f"1{suffix}").write_bytes(b"")
    message = f"{re.escape(str(path))}: pictures must be PNG, WEBP, JPEG, BMP or PPM .*convert it"
    with pytest.raises(DataError, match=message):
        scan(root / "train")


def test_every_layout_of_folders_reads_the_same_formats(tmp_path):
    for name in CIFAR10.classes:
        (tmp_path / name).mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / name / "0.png")
        (tmp_path / name / "._0.png").write_bytes(b"hidden")
    assert len(read_part(tmp_path, CIFAR10)) == 10
    (tmp_path / "cat" / "1.gif").write_bytes(b"")
    with pytest.raises(DataError, match=r"1\.gif: pictures must be PNG"):
        read_part(tmp_path, CIFAR10)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_picture_beside_the_classes_is_named_and_the_remedy_works(root, part):
    shutil.copytree(root / "train", root / "val", dirs_exist_ok=True)
    picture(stray := root / part / "lost.png", 9)
    (root / part / "notes.txt").write_text("no picture")
    named = f"{re.escape(str(stray))}: a picture beside .* move it into one of cats, dogs"
    with pytest.raises(DataError, match=named):
        scan(root / part)
    stray.rename(root / part / "cats" / "lost.png")
    assert scan(root / part)[0] == ("cats", "dogs")


def test_one_class_is_refused(root):
    shutil.rmtree(root / "train" / "cats")
    with pytest.raises(DataError, match=r"train: .*needs two classes, found only dogs"):
        scan(root / "train")
    shutil.rmtree(root / "train" / "dogs")
    with pytest.raises(DataError, match=r"train: .*needs two classes, found no folder"):
        scan(root / "train")


def test_pictures_may_be_in_folders_inside_a_class_and_behind_links(root):
    (root / "train" / "cats").rename(root / "elsewhere")
    (root / "train" / "cats").mkdir()
    (root / "train" / "cats" / "inside").symlink_to(root / "elsewhere")
    classes, samples = scan(root / "train")
    assert classes == ("cats", "dogs")
    assert [label for _, label in samples] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("ways", [{"cats/all": "."}, {"cats/a": "../dogs", "dogs/b": "../cats"}])
def test_links_in_a_circle_are_refused_and_the_remedy_works(root, ways):
    for link, target in ways.items():
        (root / "train" / link).symlink_to(target)
    with pytest.raises(DataError, match=r"a link to a folder around it, .*: remove it") as raised:
        scan(root / "train")
    Path(str(raised.value).split(": a link")[0]).unlink()
    assert len(scan(root / "train")[1]) == 6 + 3 * (len(ways) - 1)


@pytest.mark.parametrize("link", ["birds", "cats/more", "cats/a/b"])
def test_a_link_to_nothing_is_refused_and_both_remedies_work(root, link):
    (path := root / "train" / link).parent.mkdir(exist_ok=True)
    (root / "train" / "cats" / ".hidden").symlink_to("nowhere")
    path.symlink_to(target := root / "moved")
    message = f"{re.escape(str(path))}: a link to {re.escape(str(target))}, where nothing is"
    with pytest.raises(DataError, match=message):
        scan(root / "train")
    shutil.copytree(root / "train" / "dogs", target)
    assert len(scan(root / "train")[1]) == 9
    path.unlink()
    assert len(scan(root / "train")[1]) == 6
