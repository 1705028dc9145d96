"""A recipe's name and the options that change it, as `train` and `compare` take them."""

import sys
from collections.abc import Callable
from typing import TypeVar

import tyro

from stochastic_depth.cli import usage_error
from stochastic_depth.recipes import RECIPES
from stochastic_depth.train import Config

Arguments = TypeVar("Arguments")

HELP = """usage: stochastic-depth {command} [RECIPE] [OPTIONS]

{text}
RECIPE is one of these (default: digits):

{recipes}

stochastic-depth {command} RECIPE --help tells its options and their defaults.
"""


def parse(
    command: str, text: str, arguments: list[str], defaults: Callable[[Config], Arguments]
) -> Arguments | int:
    """The arguments of `command`, or an exit code when there is nothing to do.

    Args:
        text: for the help: what the command does, and options that need no recipe.
        defaults: the arguments of the command for the configuration of a recipe.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        recipes = "\n".join(f"  {name}" for name in RECIPES)
        print(HELP.format(command=command, text=text, recipes=recipes))
        return 0
    name = "digits"
    if arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
    if name not in RECIPES:
        return usage_error("recipe", name, RECIPES)
    default = defaults(RECIPES[name]())
    try:
        return tyro.cli(
            type(default),
            prog=f"stochastic-depth {command} {name}",
            description=RECIPES[name].__doc__,
            default=default,
            args=arguments,
        )
    except SystemExit as exit:
        sys.stdout.flush()
        return int(exit.code or 0)
