"""Decode untrusted pictures: many small ones in threads, large ones one by one."""

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stochastic_depth.data.picture_files import FORMATS, NAMED
from stochastic_depth.errors import DataError
from stochastic_depth.extras import require
from stochastic_depth.files import open_file, reading
from stochastic_depth.processes import cores
from stochastic_depth.randomness import generator

MODES = ("RGB", "L", "P", "RGBA")
CHUNK = 1000


@contextmanager
def ignore_warnings() -> Iterator[None]:
    """While entered, Pillow does not warn of large pictures, which the caller refuses, nor of
    damaged metadata, which many good pictures have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def decode(
    count: int,
    read: Callable[[int], bytes | None],
    where: Callable[[int], str],
    side: int,
) -> Tensor:
    """Decode `count` pictures.

    Args:
        read: returns the encoded bytes of picture i; called from several threads, as `where` is.
        where: returns the name of picture i for error messages.
        side: the width and height in pixels that every picture must have.

    Returns:
        uint8 [count, 3, side, side].

    Raises:
        DataError: when one of them is empty, truncated, not a picture or of a different size; names
            the first.
        MissingExtraError: when Pillow is not installed.
    """
    require("PIL.Image", "data")
    pixels = torch.empty(count, side, side, 3, dtype=torch.uint8, device="cpu")

    def decode_chunk(start: int) -> None:
        stop = min(start + CHUNK, count)
        raw = bytearray().join(decode_one(read(i), where(i), side) for i in range(start, stop))
        pixels[start:stop] = torch.frombuffer(raw, dtype=torch.uint8).view(-1, *pixels.shape[1:])

    with ThreadPoolExecutor(min(8, cores())) as pool:
        pending = [pool.submit(decode_chunk, start) for start in range(0, count, CHUNK)]
        try:
            for chunk in pending:
                chunk.result()
        finally:
            pool.shutdown(cancel_futures=True)
    return pixels.permute(0, 3, 1, 2).contiguous()


def decode_one(encoded: bytes | None, where: str, side: int) -> bytes:
    """The pixels of one picture: side * side * 3 bytes, red, green and blue in turn."""
    if not encoded:
        raise DataError(f"{where}: holds no bytes of an image: fetch it again")
    image = require("PIL.Image", "data")
    try:
        with image.open(BytesIO(encoded), formats=FORMATS) as picture:
            # Only the header is read so far: a picture that claims to be huge is refused here.
            if picture.size != (side, side):
                raise DataError(
                    f"{where}: an image of {picture.width}x{picture.height} pixels, expected "
                    f"{side}x{side}: the original files hold no other size"
                )
            if picture.mode not in MODES:
                raise DataError(f"{where}: an image of mode {picture.mode}, expected RGB")
            return (picture if picture.mode == "RGB" else picture.convert("RGB")).tobytes()
    except DataError:
        raise
    except Exception as error:
        # Pillow's decoders raise a dozen types of errors for damaged bytes.
        raise DataError(
            f"{where}: {len(encoded)} bytes that are no readable {'/'.join(FORMATS)} image "
            f"({type(error).__name__}: {error}): fetch the file again"
        ) from error


# Pillow itself suspects an attack from 89 million on; ImageNet's largest picture has 25 million.
MAX_PIXELS = 80_000_000
LONGEST = 100
"""The largest allowed ratio of the sides; scaling a longer picture would need too much memory."""

View = Callable[[Any], Tensor]


class FolderImages(torch.utils.data.Dataset[tuple[Tensor, int] | DataError]):
    """One part of a tree of pictures: uint8 [3, size, size] and a label for each index.

    For a picture that cannot be read, the item is the error. If a worker process raised it, it
    would reach the user wrapped in the traceback of that process.

    Args:
        samples: path and label of each picture.
        view: turns a Pillow image into a tensor.
        key: random views are a pure function of the key and the index, whichever process computes
            them, and the global random state stays as it was.
    """

    def __init__(self, samples: list[tuple[str, int]], view: View, key: tuple[int | str, ...]):
        self.samples = samples
        self.view = view
        self.key = key

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | DataError:
        path, label = self.samples[index]
        try:
            picture = open_picture(Path(path))
        except DataError as error:
            return error
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            # torch.manual_seed would seed the accelerators too.
            torch.default_generator.manual_seed(generator(*self.key, index).initial_seed())
            return self.view(picture), label


def collate(items: list[tuple[Tensor, int] | DataError]) -> tuple[Tensor, Tensor] | DataError:
    """A batch of items, or the first error among them."""
    images, labels = [], []
    for item in items:
        if isinstance(item, DataError):
            return item
        images.append(item[0])
        labels.append(item[1])
    return torch.stack(images), torch.tensor(labels, device="cpu")


def open_picture(path: Path) -> Any:
    """A decoded Pillow image in RGB, 8 bits a channel, turned upright as its EXIF data says.

    Raises:
        DataError: when it is not a picture in one of `FORMATS`, is truncated, claims to be huge or
            has a very long side, or has floating-point pixels.
        MissingExtraError: when Pillow is not installed.
    """
    image = require("PIL.Image", "data")
    with reading(path, DataError):
        file = open_file(path, follow_links=True)
    try:
        with file, ignore_warnings(), image.open(file, formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise DataError(
                    f"{path}: an image of {picture.width}x{picture.height} pixels, expected at "
                    f"most {MAX_PIXELS:,}: replace it"
                )
            if max(picture.size) > LONGEST * min(picture.size):
                raise DataError(
                    f"{path}: an image of {picture.width}x{picture.height} pixels, expected one "
                    f"side at most {LONGEST} times as long as the other: crop it, or remove it"
                )
            method = UPRIGHT.get(orientation(picture))
            pixels = eight_bits(picture, path).convert("RGB")
            return pixels if method is None else pixels.transpose(image.Transpose[method])
    except DataError:
        raise
    except require("PIL", "data").UnidentifiedImageError as error:
        raise DataError(
            f"{path}: its content is no {NAMED} image: convert it to one of these, whatever its "
            "name says; or, if it is damaged, fetch it again"
        ) from error
    except Exception as error:
        raise DataError(
            f"{path}: no readable {'/'.join(FORMATS)} image ({type(error).__name__}: {error}): "
            "fetch it again"
        ) from error


ORIENTATION = 0x0112
"""The EXIF tag that says how a camera was held."""
UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""What turns a picture upright, by the value of that tag."""


def orientation(picture: Any) -> Any:
    """The EXIF orientation of a Pillow image; None where it has none, or none that can be read."""
    with suppress(Exception):  # for damaged data, Pillow raises one of a dozen types of errors
        return picture.getexif().get(ORIENTATION)


def eight_bits(picture: Any, path: Path) -> Any:
    """A Pillow image with 16 bits a pixel as grey with 8 bits; any other one as it is.

    Raises:
        DataError: when its pixels are floating-point numbers, which have no common range.
    """
    if picture.mode == "F":
        raise DataError(
            f"{path}: its pixels are floating-point numbers: convert it to 8 or 16 bits a channel"
        )
    if picture.mode != "I" and not picture.mode.startswith("I;16"):
        return picture
    return picture.convert("I").point(sixteen_to_eight(), "L")


@cache
def sixteen_to_eight() -> list[int]:
    """For each number of 16 bits, the nearest one of 8: 65535 becomes 255."""
    return [(value + 128) // 257 for value in range(2**16)]


def training_view(size: int) -> View:
    """A random part of 8% to 100% of the area, scaled to `size`, mirrored half of the time."""
    v2 = require("torchvision.transforms.v2", "data")
    with torch.device("cpu"):  # a crop holds a tensor
        crop = v2.RandomResizedCrop(size)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])


def evaluation_view(size: int) -> View:
    """Scale the shorter side to 256/224 of `size`, then cut out the middle."""
    v2 = require("torchvision.transforms.v2", "data")
    return v2.Compose([v2.Resize(shorter_side(size)), v2.CenterCrop(size), v2.PILToTensor()])


def shorter_side(size: int) -> int:
    """The length in pixels of the shorter side before the middle of `size` pixels is cut out."""
    return size * 256 // 224
