"""The console of every command, which escapes everything that could control the terminal."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from stochastic_depth.plain_text import escaped


class PlainConsole(Console):
    """Shows brackets, colons and control characters in names from files as they are.

    That holds wherever in a table or a line they stand. Styles are given as styles, never in a
    text.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(escaped(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else escaped(text), style, control)

    def say(self, text: str) -> None:
        """Print a line without breaking it, so that paths and commands in it can be copied."""
        self.print(text, soft_wrap=True)

    @contextmanager
    def starting(self) -> Iterator[None]:
        """While entered, show on a terminal that PyTorch is being loaded, which takes seconds."""
        if "torch" in sys.modules:
            yield
            return
        with self.status("loading PyTorch"):
            yield
