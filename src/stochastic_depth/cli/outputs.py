"""Refuse to write over a file of another kind, or among the files of a run, before any work."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from stochastic_depth.errors import RunError
from stochastic_depth.files import SMALL, is_there, open_file, reading, require_replaceable
from stochastic_depth.train import layout

Kind = Literal[
    "page", "picture", "safetensors", "torch", "onnx", "description", "benchmark", "inspection"
]
"""What a command writes."""


def _object_with(*names: str) -> Callable[[bytes], bool]:
    def is_kind(content: bytes) -> bool:
        try:
            values = json.loads(content)
        except (ValueError, RecursionError):
            return False
        return isinstance(values, dict) and values.keys() >= set(names)

    return is_kind


def _is_safetensors(content: bytes) -> bool:
    return content[8:9] == b"{" and int.from_bytes(content[:8], "little") < SMALL


KINDS: dict[Kind, tuple[str, Callable[[bytes], bool]]] = {
    "page": (
        "a page that this library wrote",
        lambda content: b'<meta name="generator" content="stochastic-depth' in content,
    ),
    "picture": ("a PNG picture", lambda content: content.startswith(b"\x89PNG\r\n")),
    "safetensors": ("a safetensors file", _is_safetensors),
    "torch": ("a torch.export file", lambda content: content.startswith(b"PK")),
    "onnx": ("an ONNX network", lambda content: content.startswith(b"\x08")),
    "description": (
        "the description of an exported network",
        _object_with("format", "architecture", "input"),
    ),
    "benchmark": ("the result of a benchmark", _object_with("settings", "machine", "versions")),
    "inspection": ("the result of inspect", _object_with("model", "blocks")),
}
"""The name of each kind of file, and whether a content is of this kind."""
_OF_A_RUN = (
    layout.CONFIG,
    layout.JOURNAL,
    layout.CHECKPOINTS,
    layout.WEIGHTS,
    layout.FAILED,
    layout.ANALYSIS,
    layout.LOCK,
)


def require_output(path: Path | None, kind: Kind) -> None:
    """Raise an error if a command must not, or cannot, write a file of `kind` at `path`.

    Folders above it that are missing are created when it is written, by `files.write_output`.

    Args:
        path: nothing is checked if it is None.

    Raises:
        RunError: when `path` is among the files of a run, exists and is something else, or cannot
            be written.
    """
    if path is None:
        return
    _refuse_file_of_run(path)
    if is_there(path):
        _require_kind(path, kind)
    folder = path.parent
    while not is_there(folder):
        folder = folder.parent
    require_replaceable(folder / path.name)


def _refuse_file_of_run(path: Path) -> None:
    place = Path(os.path.abspath(path))
    place = place.parent.resolve() / place.name
    for folder in place.parents[:2]:
        is_run = is_there(folder / layout.CONFIG) and (
            is_there(folder / layout.JOURNAL) or is_there(folder / layout.CHECKPOINTS)
        )
        if is_run and place.relative_to(folder).parts[0] in _OF_A_RUN:
            raise RunError(
                f"{path} is among the files of the run {folder}, which would be lost: choose "
                "another name"
            )


def _require_kind(path: Path, kind: Kind) -> None:
    """Raise an error if what is at `path` is not of `kind`; empty files and links are accepted."""
    with reading(path, RunError):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):  # the link is replaced, and what it points to stays
            return
        if not stat.S_ISREG(mode):
            what = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
            raise RunError(f"{path} is {what}, and no file: choose another name")
        with open_file(path) as file:
            content = file.read(SMALL)
    wanted, is_kind = KINDS[kind]
    if not content or is_kind(content):
        return
    found = next((f"{name}, " for name, is_found in KINDS.values() if is_found(content)), "")
    raise RunError(f"{path} is {found}not {wanted}: choose another name, or remove it")
