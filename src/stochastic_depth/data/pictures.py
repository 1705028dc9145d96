"""Decode many small pictures of one size, in threads, and trust none of them."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import torch
from torch import Tensor

from stochastic_depth.errors import DataError
from stochastic_depth.extras import require

# Naming them keeps Pillow from trying its forty other decoders on foreign bytes.
FORMATS = ("PNG", "WEBP", "JPEG", "BMP", "PPM")
SUFFIXES = (".png", ".webp", ".jpg", ".jpeg", ".bmp", ".ppm")
MODES = ("RGB", "L", "P", "RGBA")
CHUNK = 1000


def decode(
    count: int,
    read: Callable[[int], bytes | None],
    where: Callable[[int], str],
    size: tuple[int, int],
) -> Tensor:
    """Decode `count` pictures.

    read: the encoded bytes of picture i; where: its name for messages; size: (width, height) in
    pixels that every picture must have. Both functions are called from several threads. Returns
    uint8 [count, 3, height, width].

    Raises:
        DataError: names the first picture that is empty, foreign, truncated or of another size.
        MissingExtraError: Pillow is not installed.
    """
    require("PIL.Image", "data")
    pixels = torch.empty(count, size[1], size[0], 3, dtype=torch.uint8)

    def decode_chunk(start: int) -> None:
        stop = min(start + CHUNK, count)
        raw = bytearray().join(decode_one(read(i), where(i), size) for i in range(start, stop))
        pixels[start:stop] = torch.frombuffer(raw, dtype=torch.uint8).view(-1, *pixels.shape[1:])

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        pending = [pool.submit(decode_chunk, start) for start in range(0, count, CHUNK)]
        try:
            for chunk in pending:
                chunk.result()
        finally:
            pool.shutdown(cancel_futures=True)
    return pixels.permute(0, 3, 1, 2).contiguous()


def decode_one(encoded: bytes | None, where: str, size: tuple[int, int]) -> bytes:
    """The pixels of one picture: height * width * 3 bytes, red, green and blue in turn."""
    if not encoded:
        raise DataError(f"{where}: holds no bytes of an image: fetch it again")
    image = require("PIL.Image", "data")
    try:
        with image.open(BytesIO(encoded), formats=FORMATS) as picture:
            # The header alone is read so far: a picture that claims to be huge stops here.
            if picture.size != size:
                raise DataError(
                    f"{where}: an image of {picture.width}x{picture.height} pixels, expected "
                    f"{size[0]}x{size[1]}: the original files hold no other size"
                )
            if picture.mode not in MODES:
                raise DataError(f"{where}: an image of mode {picture.mode}, expected RGB")
            return (picture if picture.mode == "RGB" else picture.convert("RGB")).tobytes()
    except DataError:
        raise
    except Exception as error:
        # Pillow's decoders raise a dozen types on damaged bytes.
        raise DataError(
            f"{where}: {len(encoded)} bytes that are no readable {'/'.join(FORMATS)} image "
            f"({type(error).__name__}: {error}): fetch the file again"
        ) from error
