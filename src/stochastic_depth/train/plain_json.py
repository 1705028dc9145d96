"""Configurations as plain JSON values, and back."""

import dataclasses
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from stochastic_depth.errors import ConfigError


def plain(value: Any) -> Any:
    """The fields of a configuration, from `dataclasses.asdict`, as plain JSON values."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def restore(kind: Any, value: Any, where: str) -> Any:
    """Convert plain JSON to an instance of `kind`.

    Raises:
        ConfigError: when the value has another type; the message names `where`.
    """
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        if not isinstance(value, dict) or set(value) != set(hints):
            found = sorted(value) if isinstance(value, dict) else value
            raise ConfigError(f"{where} must have the fields {sorted(hints)}, it has {found}")
        values = {k: restore(hints[k], item, f"{where}.{k}") for k, item in value.items()}
        return kind(**values)
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    for option in options:
        if option is types.NoneType and value is None:
            return None
        if get_origin(option) is Literal and value in get_args(option):
            return value
        if get_origin(option) is tuple and isinstance(value, list):
            return tuple(restore(get_args(option)[0], item, where) for item in value)
        if option is Path and isinstance(value, str) and "\0" not in value:
            return Path(value)
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            if not -1e308 < value < 1e308:
                break
            return float(value)
        if type(value) is option:
            return value
    raise ConfigError(f"{where} is {value!r}: expected {kind}")
