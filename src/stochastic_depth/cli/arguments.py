"""Parse sub-commands, recipes and run folders, which several commands take."""

import ast
import dataclasses
import difflib
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
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

from stochastic_depth.errors import ConfigError, RunError
from stochastic_depth.files import visible
from stochastic_depth.recipes import RECIPES
from stochastic_depth.train.config import Config

Arguments = TypeVar("Arguments")
Name = TypeVar("Name", bound=str)
DEFAULT = "digits"
"""The recipe that is used when none is given."""

COMMON = ("--data.root DIR", "--epochs INT", "--seed INT", "--optimizer.batch INT", "--device STR")
"""The options of a recipe that are used most with every command."""

Flag = tyro.conf.FlagCreatePairsOff[bool]
"""An option without a value, which has no opposite."""

READING = ConstructorRegistry()
"""How tyro reads numbers and dataclasses of options."""


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


def choose(
    program: str, about: str, what: str, choices: Mapping[Name, str], arguments: list[str]
) -> tuple[Name, list[str]]:
    """Take the first argument, one of `choices`; returns it and the remaining arguments.

    Only the chosen sub-command is parsed further, so that the modules of the others are not
    imported.

    Args:
        choices: what each sub-command does, by name.

    Raises:
        SystemExit: after printing help, or what is wrong.
    """
    name, *rest = arguments or ["--help"]
    for known in choices:
        if known == name:
            return known, rest
    if name in ("-h", "--help"):
        _show_help(program, about, what, choices)
    raise SystemExit(usage_error(what, name, choices))


def usage_error(what: str, given: str, known: Iterable[str]) -> int:
    """Print that there is no `what` named `given`, and similar names; returns the exit code."""
    close = difflib.get_close_matches(given, list(known), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(known)}"
    print(f"error: there is no {what} {visible(given)!r}; {hint}", file=sys.stderr)
    return 2


def parse(
    kind: type[Arguments],
    program: str,
    arguments: list[str],
    about: str | None = None,
    default: Arguments | None = None,
) -> Arguments:
    """Parse the arguments of a command into an instance of the dataclass `kind`.

    Args:
        about: the text of the help; the docstring of `kind` when not given.
        default: has the values of options that are not given.

    Raises:
        SystemExit: after printing help, or what is wrong.
    """
    call = partial(
        tyro.cli,
        kind,
        prog=f"stochastic-depth {program}",
        description="",
        args=arguments,
        default=tyro.MISSING_NONPROP if default is None else default,
        registry=READING,
    )
    if {"-h", "--help"} & set(arguments):
        usage, boxes = _help_of(call)
        print(_usage(usage), wrap_text(str(kind.__doc__) if about is None else about), "", sep="\n")
        print(boxes, end="")
        raise SystemExit(0)
    asked = call()
    with usage_errors():
        getattr(asked, "check", lambda: None)()
    return asked


@contextmanager
def usage_errors() -> Iterator[None]:
    """While entered, a ConfigError is one of the command line: print it, and exit with code 2."""
    try:
        yield
    except ConfigError as error:
        print(f"error: {visible(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None


def parse_recipe(
    command: str,
    about: str,
    arguments: list[str],
    defaults: Callable[[Config], Arguments],
    common: Iterable[str],
    no_recipe: type = object,
) -> Arguments:
    """Parse the arguments of a command that takes a recipe and options that change it.

    Args:
        about: for the help, what the command does.
        defaults: returns the arguments of the command for the configuration of a recipe.
        common: for the help without a recipe, the options of the command that are used most; those
            of the configuration are added.
        no_recipe: for the help, a dataclass of options that need no recipe.

    Raises:
        SystemExit: after printing help, or what is wrong.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        recipes = {name: describe_recipe(name).splitlines()[0] for name in RECIPES}
        recipes[DEFAULT] += " The default."
        after = (
            f"Options: stochastic-depth {command} RECIPE --help\n\n"
            f"Those used most: {', '.join((*common, *COMMON))}."
        )
        _show_help(f"stochastic-depth {command}", about, "recipe", recipes, after, no_recipe)
    name = DEFAULT
    if arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
    if name not in RECIPES:
        raise SystemExit(usage_error("recipe", name, RECIPES))
    default = defaults(RECIPES[name]())
    return parse(type(default), f"{command} {name}", arguments, describe_recipe(name), default)


def describe_recipe(recipe: str) -> str:
    """The docstring of a recipe, without its indentation."""
    return "\n".join(line.strip() for line in (RECIPES[recipe].__doc__ or "").splitlines())


def require_run(path: Path) -> None:
    """Raise an error if `path` is not a run folder, before PyTorch is loaded.

    Raises:
        RunError: naming the file that is missing.
    """
    if not (path / "config.json").exists():
        within = sorted(str(described.parent) for described in path.glob("*/config.json"))
        remedy = f"; the runs in it are {', '.join(within)}" if within else ""
        raise RunError(f"{path} is not a run folder: {path / 'config.json'} cannot be read{remedy}")


def _show_help(
    program: str,
    about: str,
    what: str,
    choices: Mapping[Name, str],
    after: str = "",
    no_recipe: type = object,
) -> None:
    """Print help on sub-commands, in the layout of tyro's help, and exit.

    Args:
        after: what is printed below the sub-commands.
        no_recipe: a dataclass of options that need no sub-command; then one is the default.

    Raises:
        SystemExit: always.
    """
    kinds = {name: make_dataclass(name.title(), []) for name in choices}
    members = [
        Annotated[kinds[name], tyro.conf.subcommand(name, description=does, prefix_name=False)]
        for name, does in choices.items()
    ]
    union = Union[tuple(members)]  # noqa: UP007
    default = {str(name): kind for name, kind in kinds.items()}.get(DEFAULT)
    chosen = field() if default is None else field(default_factory=default)
    shown = make_dataclass(
        "Shown", [(what, union, chosen)], bases=(no_recipe,), frozen=True, kw_only=True
    )
    usage, boxes = _help_of(
        partial(tyro.cli, shown, prog=program, args=["--help"], registry=READING)
    )
    # tyro lists every choice in the first line.
    usage = usage.replace("{" + ",".join(choices) + "}", what.upper())
    print(_usage(usage), wrap_text(about), "", sep="\n")
    print(boxes, end="")
    if after:
        print("", wrap_text(after), sep="\n")
    raise SystemExit(0)


def _help_of(call: Callable[[], object]) -> tuple[str, str]:
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


def _usage(line: str) -> str:
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
