"""Optional dependencies, imported where they are used."""

import importlib
from types import ModuleType

from stochastic_depth.errors import MissingExtraError


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or say in one sentence which extra brings it.

    Raises:
        MissingExtraError: with the pip command.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:
        raise MissingExtraError(
            f"{module} cannot be imported ({error}): pip install 'stochastic-depth[{extra}]'"
        ) from error
