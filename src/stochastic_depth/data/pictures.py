"""Decode untrusted pictures: many small ones in threads, large ones one by one."""

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stochastic_depth.errors import DataError
from stochastic_depth.extras import require
from stochastic_depth.files import open_file, reading
from stochastic_depth.processes import cores
from stochastic_depth.randomness import generator

# Naming them keeps Pillow from trying its forty other decoders on foreign bytes.
FORMATS = ("PNG", "WEBP", "JPEG", "BMP", "PPM")
SUFFIXES = (".png", ".webp", ".jpg", ".jpeg", ".bmp", ".ppm")
MODES = ("RGB", "L", "P", "RGBA")
CHUNK = 1000


@contextmanager
def ignore_size_warning(image: Any) -> Iterator[None]:
    """While entered, Pillow does not warn of large pictures; the caller refuses them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", image.DecompressionBombWarning)
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
    """A decoded Pillow image in RGB.

    Raises:
        DataError: when it is not a picture, is truncated, or claims to be huge.
        MissingExtraError: when Pillow is not installed.
    """
    image = require("PIL.Image", "data")
    with reading(path, DataError):
        file = open_file(path, real_parts=0)
    try:
        with file, ignore_size_warning(image), image.open(file, formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise DataError(
                    f"{path}: an image of {picture.width}x{picture.height} pixels, expected at "
                    f"most {MAX_PIXELS:,}: replace it"
                )
            return picture.convert("RGB")
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{path}: no readable {'/'.join(FORMATS)} image ({type(error).__name__}: {error}): "
            "fetch it again"
        ) from error


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
