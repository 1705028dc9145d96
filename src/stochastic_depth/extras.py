"""Optional dependencies, imported where they are used."""

import importlib
from pathlib import Path
from types import ModuleType

from stochastic_depth.errors import MissingExtraError

NAME = "stochastic-depth"


def require(module: str, extra: str) -> ModuleType:
    """Import `module`; if that fails, raise an error that names the extra to install.

    Raises:
        MissingExtraError: with the pip command.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:
        raise MissingExtraError(
            f"{module} cannot be imported ({error}): {installing(extra, module)}"
        ) from error


def installing(extra: str, module: str) -> str:
    """The command that installs an extra.

    It installs from where this library came from, a checkout or a wheel. If that is gone, it names
    the packages of the extra. pip is never given the name of this library alone, because the
    package of that name in the index may be another one.
    """
    import re  # loaded only where something is missing
    import shlex
    from contextlib import suppress
    from importlib import metadata

    source = _source()
    if source is not None:
        return f"pip install {shlex.quote(f'{source}[{extra}]')}"
    with suppress(metadata.PackageNotFoundError):
        needed = [
            requirement.partition(";")[0].strip()
            for requirement in metadata.requires(NAME) or ()
            if re.search(rf"extra == ['\"]{extra}['\"]", requirement)
        ]
        if needed:
            return f"pip install {shlex.join(needed)}"
    return f"pip install {module.partition('.')[0]}"


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
