"""The console of every command: what comes from files and runs is printed as text."""

from typing import Any

from rich.console import Console
from rich.text import Text

from stochastic_depth.terminal import visible


class PlainConsole(Console):
    """Brackets, colons and control characters in a name are just that.

    Styles are given as styles, never within a text.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)
