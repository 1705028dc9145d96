"""Optional dependencies, imported where they are used."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from stochastic_depth.errors import MissingExtraError

if TYPE_CHECKING:
    import torch

NAME = "stochastic-depth"


def require(module: str, extra: str) -> ModuleType:
    """Import `module`; if that fails, raise an error that names the extra to install.

    Raises:
        MissingExtraError: with the pip command.
    """
    try:
        if module.partition(".")[0] == "torchvision":
            import_torchvision()
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:
        raise MissingExtraError(
            f"{module} cannot be imported ({error}): {installing(extra, module)}"
        ) from error


def import_torchvision() -> None:
    """Import torchvision if it is there, also one that was built for another PyTorch.

    With a CPU build of PyTorch, a torchvision from another index has no compiled operators, and its
    import fails because two of them are missing. Everything else in it works.
    """
    import torch

    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        if "torchvision::" not in str(error) or _declared:
            return
        operators = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            operators.define(
                f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
        _declared.append(operators)


_declared: "list[torch.library.Library]" = []
"""Kept alive, because the declarations of a library end when it is deleted."""


def installing(extra: str, module: str) -> str:
    """The command that installs an extra.

    It installs from where this library came from, a checkout or a wheel. If that is gone, it names
    the packages of the extra. pip is never given the name of this library alone, because the
    package of that name in the index may be another one. Where torchvision is installed, the
    version of PyTorch is named, which pip would replace by the newest.
    """
    import re  # loaded only where something is missing
    import shlex
    from contextlib import suppress
    from importlib import metadata

    source = _source()
    if source is not None:
        return f"pip install {shlex.join([f'{source}[{extra}]', *_kept(extra)])}"
    with suppress(metadata.PackageNotFoundError):
        needed = [
            requirement.partition(";")[0].strip()
            for requirement in metadata.requires(NAME) or ()
            if re.search(rf"extra == ['\"]{extra}['\"]", requirement)
        ]
        if needed:
            return f"pip install {shlex.join([*needed, *_kept(extra)])}"
    return f"pip install {module.partition('.')[0]}"


def _kept(extra: str) -> list[str]:
    """The installed PyTorch as pip writes it, if a package of the extra needs a certain one."""
    from importlib import metadata

    if extra != "data":
        return []
    try:
        return [f"torch=={metadata.version('torch').partition('+')[0]}"]
    except metadata.PackageNotFoundError:
        return []


def _source() -> Path | None:
    """The checkout or the wheel that this library was installed from, if it is still there."""
    import json
    from contextlib import suppress
    from importlib import metadata
    from urllib.parse import unquote, urlparse

    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").is_file() and (checkout / "src" / "stochastic_depth").is_dir():
        return checkout
    with suppress(metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        url = urlparse(
            json.loads(metadata.distribution(NAME).read_text("direct_url.json") or "")["url"]
        )
        path = Path(unquote(url.path))
        if url.scheme == "file" and path.exists():
            return path
    return None
