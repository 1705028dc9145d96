"""The picture files of a data set: their formats, where they are, and a hash of their contents."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stochastic_depth.errors import DataError
from stochastic_depth.files import open_file, reading
from stochastic_depth.processes import cores

# Naming them keeps Pillow from trying its forty other decoders on foreign bytes.
FORMATS = ("PNG", "WEBP", "JPEG", "BMP", "PPM")
SUFFIXES = (".png", ".webp", ".jpg", ".jpeg", ".jfif", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm")
"""How the names of pictures in these formats end, in lower case."""
NAMED = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
"""The formats, for messages."""
OTHER_SUFFIXES = frozenset(
    ".gif .tif .tiff .heic .heif .avif .jxl .jp2 .j2k .pfm .svg .ico .tga "
    ".dds .psd .pcx .qoi .exr .hdr .dng .raw .cr2 .cr3 .nef .arw .orf .raf .rw2".split()
)
"""Names of pictures in formats that are not read end like this."""

Samples = list[tuple[str, int]]
"""Path and label of each picture."""

COMPARED = 2**32
"""Up to this many bytes of a data set are read for its fingerprint."""
LEAST = 2**13
"""At least this many bytes of each picture are read, even if that is more in all."""
BLOCK = 2**12
CHUNK = 1000


def picture_names(folder: Path | str, names: Iterable[str]) -> list[str]:
    """The names of pictures among `names`, sorted. Hidden files and those of other kinds are not.

    Raises:
        DataError: for a picture in a format that is not read, or a link to nothing, which may stand
            for a folder of pictures; names it.
    """
    visible = sorted(name for name in names if not name.startswith("."))
    pictures = [name for name in visible if _suffix(name) in SUFFIXES]
    for name in sorted({*visible} - {*pictures}):
        path = Path(folder, name)
        if _suffix(name) in OTHER_SUFFIXES:
            raise DataError(
                f"{path}: pictures must be {NAMED} ({', '.join(SUFFIXES)}): "
                "convert it to one of these, or remove it"
            )
        if path.is_symlink() and not path.exists():
            raise DataError(
                f"{path}: a link to {path.readlink()}, where nothing is: put there what it links "
                "to, or remove it"
            )
    return pictures


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def scan(folder: Path) -> tuple[tuple[str, ...], Samples]:
    """The classes, sorted, and the path and label of every picture, sorted.

    A class is a folder that is not hidden; pictures may be in folders inside it.

    Raises:
        DataError: when there are fewer than two classes, one has no pictures, a picture is in a
            format that is not read or in no class, or a folder holds a link to one around it or
            to nothing.
    """
    expected = (
        "expected one folder of pictures for each class, as in train/n01440764/ and val/n01440764/"
    )
    with reading(None, DataError):
        if not folder.is_dir():
            raise DataError(f"{folder}: {expected}; there is no such folder")
        found = os.listdir(folder)
    folders = [name for name in found if (folder / name).is_dir()]
    classes = sorted(name for name in folders if not name.startswith("."))
    stray = picture_names(folder, set(found).difference(folders))
    if len(classes) < 2:
        raise DataError(
            f"{folder}: {expected}; a classifier needs two classes, found "
            f"{f'only {classes[0]}' if classes else 'no folder'}"
        )
    if stray:
        raise DataError(
            f"{folder / stray[0]}: a picture beside the folders of the classes has no class: move "
            f"it into one of {', '.join(classes[:8])}, or remove it"
        )
    samples: Samples = []
    for label, name in enumerate(classes):
        pictures = _pictures_below(folder / name)
        if not pictures:
            raise DataError(f"{folder / name}: holds no pictures ({', '.join(SUFFIXES)})")
        samples += [(path, label) for path in pictures]
    return tuple(classes), samples


def _pictures_below(folder: Path) -> list[str]:
    def fail(error: OSError) -> None:
        raise error

    paths: list[str] = []
    with reading(folder, DataError):
        for above, folders, names in os.walk(folder, onerror=fail, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for path in (Path(above, name) for name in folders):
                if path.is_symlink() and any(map(path.samefile, path.absolute().parents)):
                    raise DataError(
                        f"{path}: a link to a folder around it, whose pictures would be found "
                        "again and again: remove it"
                    )
            paths += [os.path.join(above, name) for name in picture_names(above, names)]
    return paths


def fingerprint(root: Path, classes: Sequence[str], parts: Mapping[str, Samples]) -> str:
    """A hash of the classes, and of the name and content of each picture in each part.

    If all pictures together have more than `COMPARED` bytes, their sizes are compared, and of
    every picture an equal share of these bytes, in blocks that are spread evenly over it.

    Returns:
        sha256: 64 hexadecimal digits.

    Raises:
        DataError: when a picture cannot be read; names it.
    """
    paths = list({path for samples in parts.values() for path, _ in samples})
    with reading(None, DataError):
        sizes = [os.stat(path).st_size for path in paths]
    whole = sum(sizes) <= COMPARED
    most = max(sizes, default=0) if whole else max(LEAST, COMPARED // len(paths))

    def hash_chunk(start: int) -> list[bytes]:
        return [content_hash(Path(path), most) for path in paths[start : start + CHUNK]]

    with ThreadPoolExecutor(min(8, cores())) as pool:
        chunks = list(pool.map(hash_chunk, range(0, len(paths), CHUNK)))
    hashes = dict(zip(paths, (each for chunk in chunks for each in chunk), strict=True))
    digest = hashlib.sha256(repr(tuple(classes)).encode())
    for part, samples in parts.items():
        for path, label in samples:
            relative = Path(path).relative_to(root).as_posix()
            digest.update(repr((part, relative, label, hashes[path])).encode())
    return digest.hexdigest()


def content_hash(path: Path, most: int) -> bytes:
    """sha256 of the size of a file and its content.

    Args:
        most: of a larger file only this many bytes are read, at least two blocks: the first, the
            last, and others at equal distances between them.
    """
    with reading(path, DataError), open_file(path, follow_links=True) as file:
        opened = file.fileno()
        size = os.fstat(opened).st_size
        digest = hashlib.sha256(repr(size).encode())
        if size <= most:
            while block := file.read(2**20):
                digest.update(block)
        else:
            blocks = max(2, most // BLOCK)
            for number in range(blocks):
                offset = number * (size - BLOCK) // (blocks - 1)
                digest.update(os.pread(opened, BLOCK, offset))
        return digest.digest()
