"""Parse sub-commands, recipes and run folders, which several commands take."""

import difflib
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import field, make_dataclass
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Annotated, TypeVar, Union

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from stochastic_depth.errors import ConfigError, RunError
from stochastic_depth.files import visible
from stochastic_depth.recipes import RECIPES
from stochastic_depth.train.config import Config

Arguments = TypeVar("Arguments")
Name = TypeVar("Name", bound=str)
DEFAULT = "digits"
"""The recipe that is used when none is given."""

NUMBERS = ConstructorRegistry()
"""How tyro reads numbers, with an error that speaks of numbers and not of Python's `int()`."""


@NUMBERS.primitive_rule
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
    asked = tyro.cli(
        kind,
        prog=f"stochastic-depth {program}",
        description=about,
        args=arguments,
        default=tyro.MISSING_NONPROP if default is None else default,
        registry=NUMBERS,
    )
    with understood():
        getattr(asked, "check", lambda: None)()
    return asked


@contextmanager
def understood() -> Iterator[None]:
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
    no_recipe: type = object,
) -> Arguments:
    """Parse the arguments of a command that takes a recipe and options that change it.

    Args:
        about: for the help, what the command does.
        defaults: returns the arguments of the command for the configuration of a recipe.
        no_recipe: for the help, a dataclass of options that need no recipe.

    Raises:
        SystemExit: after printing help, or what is wrong.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        recipes = {name: described(name).splitlines()[0] for name in RECIPES}
        recipes[DEFAULT] += " The default."
        _show_help(f"stochastic-depth {command}", about, "recipe", recipes, no_recipe, DEFAULT)
    name = DEFAULT
    if arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
    if name not in RECIPES:
        raise SystemExit(usage_error("recipe", name, RECIPES))
    default = defaults(RECIPES[name]())
    return parse(type(default), f"{command} {name}", arguments, described(name), default)


def described(recipe: str) -> str:
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
    no_recipe: type = object,
    default: Name | None = None,
) -> None:
    """Print help on sub-commands, in the layout of tyro's help, and exit.

    Raises:
        SystemExit: always.
    """
    kinds = {name: make_dataclass(name.title(), []) for name in choices}
    members = [
        Annotated[kinds[name], tyro.conf.subcommand(name, description=does, prefix_name=False)]
        for name, does in choices.items()
    ]
    union = Union[tuple(members)]  # noqa: UP007
    chosen = field() if default is None else field(default_factory=kinds[default])
    shown = make_dataclass(
        "Shown", [(what, union, chosen)], bases=(no_recipe,), frozen=True, kw_only=True
    )
    written = TextIOWrapper(BytesIO(), encoding=sys.stdout.encoding)
    with redirect_stdout(written), suppress(SystemExit):
        tyro.cli(shown, prog=program, args=["--help"])
    written.seek(0)
    # tyro lists every choice in the first line, and wraps neither this line nor a description.
    usage, _, boxes = written.read().partition("\n")
    usage = usage.replace("{" + ",".join(choices) + "}", what.upper())
    usage = textwrap.fill(usage, 80, subsequent_indent="    ", break_on_hyphens=False)
    print(usage, "", about.strip(), sep="\n")
    print(boxes, end="")
    raise SystemExit(0)
