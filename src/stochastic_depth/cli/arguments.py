"""Parse sub-commands, recipes and run folders, which several commands take."""

import difflib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TypeVar

import tyro

from stochastic_depth.cli.help import READING, show_choices, wrap_text
from stochastic_depth.errors import ConfigError, RunError
from stochastic_depth.plain_text import escaped
from stochastic_depth.recipes import RECIPES, describe_recipe
from stochastic_depth.train import layout
from stochastic_depth.train.config import Config

Arguments = TypeVar("Arguments")
Name = TypeVar("Name", bound=str)
DEFAULT = "digits"
"""The recipe that is used when none is given."""

COMMON = ("--data.root DIR", "--epochs INT", "--seed INT", "--optimizer.batch INT", "--device STR")
"""The options of a recipe that are used most with every command."""

Flag = tyro.conf.FlagCreatePairsOff[bool]
"""An option without a value, which has no opposite."""


def refuse(message: str) -> NoReturn:
    """Print what is wrong with the command line, and exit with code 2."""
    print(f"error: {escaped(message)}", file=sys.stderr)
    raise SystemExit(2)


def refuse_unknown(what: str, given: str, known: Iterable[str]) -> NoReturn:
    """`refuse`, because there is no `what` named `given`; similar names are given."""
    close = difflib.get_close_matches(given, list(known), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(known)}"
    refuse(f"there is no {what} {given!r}; {hint}")


@contextmanager
def config_errors_refused() -> Iterator[None]:
    """While entered, a ConfigError is one of the command line: `refuse` it."""
    try:
        yield
    except ConfigError as error:
        refuse(str(error))


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
        show_choices(f"{program} [-h] {what.upper()} ...", about, f"{what}s", choices)
        raise SystemExit(0)
    refuse_unknown(what, name, choices)


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
    if {"-h", "--help"} & set(arguments):
        # tyro would join the lines of such a text, and not wrap it.
        print(wrap_text(inspect.getdoc(kind) or "" if about is None else about), end="\n\n")
    asked = tyro.cli(
        kind,
        prog=f"stochastic-depth {program}",
        description="",
        args=arguments,
        default=tyro.MISSING_NONPROP if default is None else default,
        registry=READING,
    )
    with config_errors_refused():
        getattr(asked, "check", lambda: None)()
    return asked


def parse_recipe(
    command: str,
    about: str,
    arguments: list[str],
    defaults: Callable[[Config], Arguments],
    common: Iterable[str],
) -> Arguments:
    """Parse the arguments of a command that takes a recipe and options that change it.

    Args:
        about: for the help, what the command does.
        defaults: returns the arguments of the command for the configuration of a recipe.
        common: for the help without a recipe, the options of the command that are used most; those
            of the configuration are added.

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
        usage = f"stochastic-depth {command} [-h] [RECIPE] [OPTIONS]"
        show_choices(usage, about, "recipes", recipes, after)
        raise SystemExit(0)
    name = DEFAULT
    if arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
    if name not in RECIPES:
        refuse_unknown("recipe", name, RECIPES)
    default = defaults(RECIPES[name]())
    return parse(type(default), f"{command} {name}", arguments, describe_recipe(name), default)


def options_in(arguments: Iterable[str]) -> set[str]:
    """The options among `arguments` as --name, also where given as --name=value or --no-name."""
    names = (argument.split("=")[0].replace("_", "-") for argument in arguments)
    return {name.replace(".no-", ".") for name in names if name.startswith("--")}


def refuse_without_effect(configs: Iterable[Config], arguments: list[str]) -> None:
    """Refuse `arguments` that have no effect in any of `configs`, because of others.

    Raises:
        SystemExit: after printing which one, and what to do.
    """
    first, *others = [config.without_effect() for config in configs]
    given = options_in(arguments)
    for option, problem in first.items():
        if f"--{option}" in given and all(option in other for other in others):
            refuse(problem)


def require_run(path: Path) -> None:
    """Raise an error if `path` is not a run folder, before PyTorch is loaded.

    Raises:
        RunError: naming the file that is missing.
    """
    if layout.has_lost_config(path):
        raise layout.lost_config(path)
    if not (path / layout.CONFIG).exists():
        within = sorted(str(described.parent) for described in path.glob(f"*/{layout.CONFIG}"))
        remedy = f"; the runs in it are {', '.join(within)}" if within else ""
        raise RunError(f"{path} is not a run folder: {path / layout.CONFIG} cannot be read{remedy}")
