"""stochastic-depth recipes [RECIPE]."""

import inspect
import json

from rich.table import Table

from stochastic_depth.cli import usage_error
from stochastic_depth.cli.console import PlainConsole
from stochastic_depth.recipes import RECIPES

HELP = """usage: stochastic-depth recipes [RECIPE]

List the recipes, or tell one: source, command, published result, cost and
configuration.
"""


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help"):
        print(HELP)
        return 0
    console = PlainConsole()
    if not arguments:
        table = Table()
        table.add_column("recipe", no_wrap=True)
        table.add_column("what")
        for name, recipe in RECIPES.items():
            table.add_row(name, inspect.getdoc(recipe).splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
        console.print(table)
        return 0
    name = arguments[0]
    if name not in RECIPES:
        return usage_error("recipe", name, RECIPES)
    console.print(inspect.getdoc(RECIPES[name]))
    console.print_json(json.dumps(RECIPES[name]().to_json()))
    return 0
