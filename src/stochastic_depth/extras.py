"""Optional dependencies, imported where they are used."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from stochastic_depth.errors import MissingExtraError

if TYPE_CHECKING:
    import torch

NAME = "stochastic-depth"


def require(module: str, extra: str | None = None) -> ModuleType:
    """Import `module`; if that fails, raise an error that says what to install.

    Args:
        extra: the extra of this library that installs it; None for a library that its user chose.

    Raises:
        MissingExtraError: with the pip command.
    """
    try:
        if extra is None or module.partition(".")[0] == "torchvision":
            import_torchvision()  # which such libraries may import
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:
        if extra is None and not isinstance(error, ModuleNotFoundError):
            remedy = "it is installed, but not for this PyTorch: install both from the same index"
        else:
            remedy = installing(extra, module)
        raise MissingExtraError(f"{module} cannot be imported ({error}): {remedy}") from error


def require_report() -> None:
    """Import what draws charts and pages; raises `MissingExtraError` as `require` does."""
    for module in ("altair", "jinja2", "vl_convert"):
        require(module, "report")


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


def installing(extra: str | None, module: str) -> str:
    """The command that installs the packages of an extra, or that of `module` without one.

    pip is never given the name of this library, because the package of that name in the index may
    be another one. Where torchvision is installed, the version of PyTorch is named, which pip would
    replace by the newest.
    """
    import re  # loaded only where something is missing
    import shlex
    from contextlib import suppress
    from importlib import metadata

    needed: list[str] = []
    with suppress(metadata.PackageNotFoundError):
        needed = [
            requirement.partition(";")[0].strip()
            for requirement in metadata.requires(NAME) or ()
            if re.search(rf"extra == ['\"]{extra}['\"]", requirement)
        ]
        if needed and extra == "data":
            needed.append(f"torch=={metadata.version('torch').partition('+')[0]}")
    return f"pip install {shlex.join(needed or [module.partition('.')[0]])}"
