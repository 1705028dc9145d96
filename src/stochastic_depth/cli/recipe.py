"""A recipe's name and the options that change it, as `train` and `compare` take them."""

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

stochastic-depth {command} RECIPE --help tells its options.
"""


def parse(
    command: str, text: str, arguments: list[str], defaults: Callable[[Config], Arguments]
) -> Arguments:
    """The arguments of `command`.

    Args:
        text: for the help: what the command does, and options that need no recipe.
        defaults: the arguments of the command for the configuration of a recipe.

    Raises:
        SystemExit: after printing help or what is wrong.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        recipes = "\n".join(f"  {name}" for name in RECIPES)
        print(HELP.format(command=command, text=text, recipes=recipes))
        raise SystemExit(0)
    name = "digits"
    if arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
    if name not in RECIPES:
        raise SystemExit(usage_error("recipe", name, RECIPES))
    default = defaults(RECIPES[name]())
    return tyro.cli(
        type(default),
        prog=f"stochastic-depth {command} {name}",
        description=RECIPES[name].__doc__,
        default=default,
        args=arguments,
    )
