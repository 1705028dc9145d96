"""How tyro reads dataclasses of options, and the help that is printed."""

import ast
import dataclasses
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import field, make_dataclass
from functools import cache, partial
from io import BytesIO, TextIOWrapper
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_type_hints

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

Name = TypeVar("Name", bound=str)

READING = ConstructorRegistry()
"""How tyro reads numbers, paths and dataclasses of options."""


@READING.struct_rule
def _options(asked: StructTypeInfo) -> StructConstructorSpec | None:
    """A dataclass, as tyro reads it, but for its help.

    Docstrings are wrapped to the terminal whatever their lines in the source. "(none: an epoch)"
    becomes the default where that is None.
    """
    if not dataclasses.is_dataclass(asked.type):
        return None
    told, types = _field_docs(asked.type), get_type_hints(asked.type, include_extras=True)
    fields = []
    for each in dataclasses.fields(asked.type):
        default = tyro.MISSING_NONPROP
        if isinstance(asked.default, asked.type):
            default = getattr(asked.default, each.name)
        elif each.default is not dataclasses.MISSING:
            default = each.default
        elif each.default_factory is not dataclasses.MISSING:
            default = each.default_factory()
        text: str | None = told.get(each.name)
        kind: Any = types[each.name]
        if text is not None and default in (None, ()):
            meaning = NONE.search(text)
            hint = f"(default: {meaning[1]})" if meaning else ""
            text = NONE.sub("", text)
            kind = Annotated[kind, tyro.conf.arg(help_behavior_hint=hint)]
        fields.append(StructFieldSpec(each.name, kind, default, text))
    return StructConstructorSpec(asked.type, tuple(fields))


NONE = re.compile(r" \(none: ([^)]*)\)")
"""How docstrings say what None stands for."""


def _field_docs(kind: type) -> dict[str, str]:
    """The docstrings of the fields of a dataclass and its bases, each in one line."""
    told: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            told |= _docstrings(base.__module__).get(base.__name__, {})
    return told


@cache
def _docstrings(module: str) -> dict[str, dict[str, str]]:
    """The docstrings of fields, by class and field; none where there is no source to read."""
    found: dict[str, dict[str, str]] = {}
    try:
        source = inspect.getsource(sys.modules[module])
    except OSError:
        return found
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = {
                field.target.id: " ".join(text.split())
                for field, after in pairwise(node.body)
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                if isinstance(text := after.value.value, str)
            }
    return found


@READING.primitive_rule
def _number(asked: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    if asked.type not in (int, float):
        return None

    def read(words: list[str]) -> int | float:
        try:
            return asked.type(words[0])
        except ValueError:
            kind = "a whole number" if asked.type is int else "a number"
            raise ValueError(f"{words[0]!r} is not {kind}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=asked.type.__name__.upper(),
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, int if asked.type is int else (int, float)),
        str_from_instance=lambda value: [str(value)],
    )


@READING.primitive_rule
def _path(asked: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    if asked.type is not Path:
        return None

    def read(words: list[str]) -> Path:
        if not words[0]:  # which Path would take for the current folder
            raise ValueError("the name is empty: give one, or leave the option out")
        return Path(words[0])

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    )


def show_help(
    program: str,
    about: str,
    what: str,
    choices: Mapping[Name, str],
    default: str | None = None,
    after: str = "",
    alone: type = object,
) -> None:
    """Print help on sub-commands, in the layout of tyro's help, and exit.

    Args:
        default: the sub-command that is used when none is given.
        after: what is printed below the sub-commands.
        alone: a dataclass of options that need no sub-command.

    Raises:
        SystemExit: always.
    """
    kinds = {name: make_dataclass(name.title(), []) for name in choices}
    members = [
        Annotated[kinds[name], tyro.conf.subcommand(name, description=does, prefix_name=False)]
        for name, does in choices.items()
    ]
    union = Union[tuple(members)]  # noqa: UP007
    factory = {str(name): kind for name, kind in kinds.items()}.get(default or "")
    chosen = field() if factory is None else field(default_factory=factory)
    shown = make_dataclass(
        "Shown", [(what, union, chosen)], bases=(alone,), frozen=True, kw_only=True
    )
    usage, boxes = help_of(
        partial(tyro.cli, shown, prog=program, args=["--help"], registry=READING)
    )
    # tyro lists every choice in the first line.
    usage = usage.replace("{" + ",".join(choices) + "}", what.upper())
    print(usage_line(usage), wrap_text(about), "", sep="\n")
    print(boxes, end="")
    if after:
        print("", wrap_text(after), sep="\n")
    raise SystemExit(0)


def help_of(call: Callable[[], object]) -> tuple[str, str]:
    """The first line and the boxes of the help that a call of tyro prints."""
    written = TextIOWrapper(BytesIO(), encoding=sys.stdout.encoding)
    written.isatty = sys.stdout.isatty  # which decides about colours
    try:
        with redirect_stdout(written):
            call()
    except SystemExit as exit:
        if exit.code:  # what is wrong is printed already, to the standard error
            raise
    written.seek(0)
    usage, _, boxes = written.read().partition("\n")
    return usage, boxes.lstrip("\n")


def usage_line(line: str) -> str:
    """The first line of a help, wrapped, which tyro leaves long; an empty line follows."""
    line = textwrap.fill(line, _width(), subsequent_indent="    ", break_on_hyphens=False)
    return f"{line}\n"


def wrap_text(text: str) -> str:
    """Paragraphs wrapped to the terminal; a line that begins with a word and a colon stays one.

    tyro joins the lines of such a text and does not wrap it.
    """
    return "\n\n".join(map(_wrap_paragraph, text.strip().split("\n\n")))


def _wrap_paragraph(text: str) -> str:
    lines = re.split(r"\n\s*(?=[A-Z]\w*: )", text)
    return "\n".join(
        textwrap.fill(
            " ".join(line.split()),
            _width(),
            subsequent_indent="  " if len(lines) > 1 else "",
            break_on_hyphens=False,
            break_long_words=False,
        )
        for line in lines
    )


def _width() -> int:
    return min(80, shutil.get_terminal_size().columns)
