"""The console of every command, which escapes everything that could control the terminal."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from stochastic_depth.plain_text import escaped

if TYPE_CHECKING:
    from stochastic_depth.export.depths import Progress


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
        if isinstance(renderable, Table) and renderable.box:
            self._widen(renderable)
        if isinstance(renderable, Table) and (renderable.title or renderable.caption):
            renderable = self._with_free_texts(renderable)
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else escaped(text), style, control)

    def _widen(self, table: Table) -> None:
        """Let no column be narrower than its longest word: rich would shorten numbers."""
        everything = self.options.update(width=10**6)
        for column in table.columns:
            cells = (column.header, *column.cells)
            widths = [Measurement.get(self, everything, cell) for cell in cells]
            least = [width.maximum if column.no_wrap else width.minimum for width in widths]
            column.min_width = max(least, default=0)

    def print(self, *objects: Any, **options: Any) -> None:
        # A table that is wider than the console is broken there by the terminal, and not cut.
        super().print(*objects, **{"crop": False, **options})

    def _with_free_texts(self, table: Table) -> Group:
        """A table whose title and caption rich does not break at the width of the table."""
        bare = copy(table)
        bare.title = bare.caption = None
        parts: list[RenderableType] = [bare]
        if table.title:
            parts.insert(0, self.render_str(str(table.title), style="table.title"))
        if table.caption:
            parts.append(self.render_str(str(table.caption), style="table.caption"))
        return Group(*parts)

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

    @contextmanager
    def progress(self, name: str) -> Iterator["Progress"]:
        """Show the progress of what is done with `name`: a bar, or a line for each stage."""
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        stage = ""
        columns = TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn()
        with Progress(*columns, console=self, transient=True, disable=not self.is_terminal) as bar:
            task = bar.add_task(name, total=None)

            def tell(doing: str, done: float, total: float) -> None:
                nonlocal stage
                if doing != stage:
                    stage = doing
                    bar.reset(task, description=f"{name} {doing}")
                    if not self.is_terminal:
                        self.say(f"{name}: {doing}")
                bar.update(task, completed=done, total=total)

            yield tell
