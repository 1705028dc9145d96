"""How tyro reads dataclasses of options, and help on sub-commands."""

import dataclasses
import re
import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import docstring_parser
import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

READING = ConstructorRegistry()
"""How tyro reads numbers, paths and dataclasses of options."""


@READING.struct_rule
def _options(asked: StructTypeInfo) -> StructConstructorSpec | None:
    """A dataclass as tyro reads it, but for the line breaks in docstrings and "(default: None)".

    "(none: an epoch)" in a docstring becomes "(default: an epoch)" where the default is None.
    """
    if not dataclasses.is_dataclass(asked.type):
        return None
    texts = {
        param.arg_name: " ".join(str(param.description).split())
        for base in reversed(asked.type.__mro__)
        if dataclasses.is_dataclass(base)
        for param in docstring_parser.parse_from_object(base).params
    }
    types, fields = get_type_hints(asked.type, include_extras=True), []
    for each in dataclasses.fields(asked.type):
        kind: Any = types[each.name]
        default = getattr(asked.default, each.name, each.default)
        if default is dataclasses.MISSING:
            default = tyro.MISSING_NONPROP
        text = texts.get(each.name)
        if text is not None and default in (None, ()):
            text = text.replace("(none: ", "(default: ")
            kind = Annotated[kind, tyro.conf.arg(help_behavior_hint="")]
        fields.append(StructFieldSpec(each.name, kind, default, text))
    return StructConstructorSpec(asked.type, tuple(fields))


_WRONG: dict[Any, str] = {
    int: "{!r} is not a whole number",
    float: "{!r} is not a number",
    Path: "the name is empty: give one, or leave the option out",
}


@READING.primitive_rule
def _number_or_path(asked: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    if asked.type not in _WRONG:
        return None

    def read(words: list[str]) -> Any:
        try:
            if not words[0]:  # which Path would take for the current folder
                raise ValueError
            return asked.type(words[0])
        except ValueError:
            raise ValueError(_WRONG[asked.type].format(words[0])) from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=asked.type.__name__.upper(),
        instance_from_str=read,
        is_instance=lambda value: isinstance(
            value, (int, float) if asked.type is float else asked.type
        ),
        str_from_instance=lambda value: [str(value)],
    )


def show_choices(
    usage: str, about: str, what: str, choices: Mapping[Any, str], after: str = ""
) -> None:
    """Print help on sub-commands.

    Args:
        what: what the sub-commands are, in the plural.
        choices: what each sub-command does, by name.
        after: what is printed below them.
    """
    print(wrap_text(about), f"usage: {usage}", f"{what}:", sep="\n\n")
    longest = max(map(len, choices))
    for name, does in choices.items():
        print(_wrap_line(does, f"  {name:<{longest}}  ", " " * (longest + 4)))
    if after:
        print("", wrap_text(after), sep="\n")


def wrap_text(text: str) -> str:
    """Wrap a text to the terminal; a line that begins with a word and a colon stays one."""
    joined = re.sub(r"(?<!\n)\n(?!\n|\w+: )", " ", text.strip())
    return "\n".join(map(_wrap_line, joined.splitlines()))


def _wrap_line(line: str, first_indent: str = "", indent: str = "") -> str:
    return textwrap.fill(
        line,
        min(80, shutil.get_terminal_size().columns),
        initial_indent=first_indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )
