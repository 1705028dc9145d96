import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from stochastic_depth.data.pictures import decode, decode_one, open_picture
from stochastic_depth.errors import DataError
from support.data_sets import encode, png_of

SIDE = 32


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP"])
def test_many_pictures_come_out_in_order(pictures, kind):
    pixels = pictures(1100)
    options = {"lossless": True, "quality": 0} if kind == "WEBP" else {}
    encoded = [encode(image, kind, **options) for image in pixels]
    found = decode(len(encoded), encoded.__getitem__, str, SIDE)
    np.testing.assert_array_equal(found, pixels.transpose(0, 3, 1, 2))
    assert found.is_contiguous()


def test_grey_and_palette_pictures_become_rgb(pictures):
    grey = pictures(1)[0, :, :, 0]
    for picture in (Image.fromarray(grey), Image.fromarray(grey).convert("P")):
        file = io.BytesIO()
        picture.save(file, "PNG")
        found = np.frombuffer(decode_one(file.getvalue(), "here", SIDE), np.uint8)
        np.testing.assert_array_equal(found.reshape(32, 32, 3), np.stack([grey] * 3, -1))


@pytest.mark.parametrize("encoded", [b"", None])
def test_no_bytes_are_no_picture(encoded):
    with pytest.raises(DataError, match="row 3: holds no bytes"):
        decode_one(encoded, "row 3", SIDE)


def test_the_first_bad_picture_is_named(pictures):
    encoded = [encode(image) for image in pictures(1500)]
    encoded[1203] = b"GIF89a, but not really"
    with pytest.raises(DataError, match="row 1203: 22 bytes that are no readable"):
        decode(len(encoded), encoded.__getitem__, lambda i: f"row {i}", SIDE)


def test_another_size_is_refused(pictures):
    with pytest.raises(DataError, match="32x31 pixels, expected 32x32"):
        decode_one(encode(pictures(1)[0, :31]), "here", SIDE)


def test_another_mode_is_refused():
    file = io.BytesIO()
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(file, "PNG")
    with pytest.raises(DataError, match="mode I;16, expected RGB"):
        decode_one(file.getvalue(), "here", SIDE)


@pytest.mark.parametrize("side", [5_000, 11_000, 2**31 - 1])
def test_a_picture_that_claims_to_be_huge_is_not_decoded(side, monkeypatch):
    monkeypatch.setattr(Image.Image, "tobytes", lambda _: pytest.fail("decoded"))
    with pytest.raises(DataError, match="here: "):
        decode_one(png_of(side), "here", SIDE)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG", "BMP"])
@settings(max_examples=30, deadline=None)
@given(share=st.floats(0.01, 0.9))
def test_a_truncated_picture_is_refused(kind, share):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    whole = encode(pixels, kind, **({"lossless": True} if kind == "WEBP" else {}))
    encoded = whole[: int(share * len(whole))]
    with pytest.raises(DataError, match="here: "):
        decode_one(encoded, "here", SIDE)


def opened(tmp_path, name, write):
    write(tmp_path / name)
    return np.asarray(open_picture(tmp_path / name))


@pytest.mark.parametrize("suffix", ["png", "pgm"])
def test_grey_of_16_bits_becomes_the_nearest_grey_of_8(tmp_path, suffix):
    grey = (np.arange(64 * 64) * 16).astype(np.uint16).reshape(64, 64)
    grey[-1, -1] = 65535
    found = opened(tmp_path, f"grey.{suffix}", Image.fromarray(grey).save)
    expected = np.round(grey / 65535 * 255).astype(np.uint8)
    np.testing.assert_array_equal(found, np.stack([expected] * 3, -1))


def test_pixels_that_are_floating_point_numbers_are_refused(tmp_path):
    content = b"Pf 2 1 -1.0\n" + np.array([0.5, 2], "<f4").tobytes()
    with pytest.raises(DataError, match=r"deep\.ppm: its pixels are floating-point numbers"):
        opened(tmp_path, "deep.ppm", lambda path: path.write_bytes(content))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_pictures_are_turned_upright(tmp_path, kind, orientation):
    pixels = np.zeros((24, 32, 3), np.uint8)
    pixels[:8, :16] = 255
    picture, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = orientation
    found = opened(tmp_path, "p", lambda path: picture.save(path, kind, exif=exif))
    picture.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(picture))
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() < 40


def test_damaged_exif_data_is_no_reason_to_refuse_a_picture(tmp_path):
    pixels = np.zeros((24, 32, 3), np.uint8)
    for number, exif in enumerate((b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0no", b"x")):
        found = opened(
            tmp_path,
            f"{number}.jpg",
            lambda path, exif=exif: Image.fromarray(pixels).save(path, "JPEG", exif=exif),
        )
        np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize("kind", ["GIF", "TIFF"])
def test_a_format_that_is_not_read_is_named_by_content_whatever_the_name(tmp_path, kind):
    picture = Image.new("RGB", (8, 8))
    with pytest.raises(DataError, match=r"p\.png: its content is no PNG.* image: convert it"):
        opened(tmp_path, "p.png", lambda path: picture.save(path, kind))
