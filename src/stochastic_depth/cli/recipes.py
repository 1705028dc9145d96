"""stochastic-depth recipes [RECIPE]."""

import json

from stochastic_depth.cli.arguments import choose, described
from stochastic_depth.recipes import RECIPES

ABOUT = "List the recipes, or show one: source, command, published result and cost."


def recipes(arguments: list[str]) -> int:
    from stochastic_depth.cli.console import PlainConsole

    console = PlainConsole()
    summaries = {name: described(name).splitlines()[0] for name in RECIPES}
    if not arguments:
        from rich.table import Table

        table = Table()
        table.add_column("recipe", no_wrap=True)
        table.add_column("what")
        for name, summary in summaries.items():
            table.add_row(name, summary)
        console.print(table)
        return 0
    name, _ = choose("stochastic-depth recipes", ABOUT, "recipe", summaries, arguments)
    console.print(described(name).strip())
    console.print_json(json.dumps(RECIPES[name]().to_json()))
    return 0
