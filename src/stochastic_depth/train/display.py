"""The progress of runs: a live view on a terminal, plain lines elsewhere, or nothing."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from statistics import fmean
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from torch import Tensor

from stochastic_depth.draw import open_shares
from stochastic_depth.plain_text import epoch_text, escaped
from stochastic_depth.train.journal import Record
from stochastic_depth.train.run_folder import Run
from stochastic_depth.train.train_state import TrainState


def picture(gates: Tensor, width: int) -> str:
    """The gates of one step as text, the first block first: full where open, a dot where closed.

    Shares are drawn in four shades: of the samples for which a block is open, and of open blocks
    where there are more of them than characters, so that each stands for several.

    Args:
        gates: bool [L]; or [L, batch].
        width: how many characters fit.
    """
    shares = open_shares(gates).tolist()
    if gates.ndim == 1 and len(shares) <= width:
        return "".join("█" if share else "·" for share in shares)
    blocks = max(1, -(-len(shares) // width))
    starts = range(0, len(shares), blocks)
    return "".join(" ░▒▓█"[round(4 * fmean(shares[i : i + blocks]))] for i in starts)


class Silent:
    """A `Callback` that shows nothing."""

    def begin(self, run: Run, train_state: TrainState) -> None: ...
    def step(self, train_state: TrainState, loss: Tensor) -> None: ...
    def evaluating(self) -> None: ...
    def record(self, record: Record) -> None: ...
    def say(self, text: str) -> None: ...


@dataclass
class RunView:
    """The `Callback` of one run; it stores what `Display` shows."""

    label: str
    say_line: Callable[[str], None]
    live: bool = False
    """Whether there is also a live picture. If so, lines leave out the speed and the time left."""
    epochs: int = 0
    total_steps: int = 1
    step_done: int = 0
    """How many steps were taken, those before a resumption too."""
    blocks: int = 0
    gates: Tensor | None = None
    loss: Tensor | None = None
    latest: Record | None = None
    doing: str = "training"
    """Or "evaluating"."""
    began: float = field(default_factory=time.monotonic)
    began_at_step: int = 0
    """The step at `began`; above 0 for a resumed run."""

    def begin(self, run: Run, train_state: TrainState) -> None:
        self.epochs, self.total_steps = run.config.epochs, train_state.total_steps
        self.blocks = train_state.blocks
        self.step_done = self.began_at_step = train_state.step
        self.began = time.monotonic()
        if train_state.step:
            self.say(f"resuming at step {train_state.step} of {train_state.total_steps}")

    def step(self, train_state: TrainState, loss: Tensor) -> None:
        self.step_done, self.loss, self.gates = train_state.step, loss, train_state.gates
        self.doing = "training"

    def evaluating(self) -> None:
        self.doing = "evaluating"

    def record(self, record: Record) -> None:
        self.latest = record
        self.say(self.line(record))

    def say(self, text: str) -> None:
        self.say_line(escaped(f"{self.label} {text}" if self.label else text))

    def line(self, record: Record) -> str:
        """The interval's main metrics in one line of at most 80 columns."""
        line = (
            f"epoch {epoch_text(record.epoch)}/{self.epochs} loss {record.train_loss:.3g} "
            f"val {record.validation_error:.2f}% test {record.test_error:.2f}%"
        )
        if self.live:
            return line
        if not self.label:
            line += f" {record.images_per_second:,.0f} img/s"
        return f"{line} left {self.left()}"

    def left(self) -> str:
        """The estimated time to the end, evaluation included, as h:mm:ss."""
        done = self.step_done - self.began_at_step
        if done == 0:
            return "-:--:--"
        seconds = (time.monotonic() - self.began) / done
        return str(timedelta(seconds=round(seconds * (self.total_steps - self.step_done))))

    def render(self, width: int) -> Group:
        """Progress, gates and metrics, in about three lines."""
        epoch = self.step_done * self.epochs / self.total_steps
        head = Table.grid(expand=True, padding=(0, 1))
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(justify="right", no_wrap=True)
        head.add_row(
            Text(escaped(self.label or self.doing)),
            ProgressBar(total=self.total_steps, completed=self.step_done),
            Text(f"epoch {epoch:.1f}/{self.epochs}  left {self.left()}"),
        )
        lines: list[Table | Text] = [head]
        if self.gates is not None and self.loss is not None:
            open_blocks = open_shares(self.gates).sum().item()
            lines.append(Text(picture(self.gates, width), style="green"))
            figures = (
                f"step {self.step_done}  loss {self.loss.item():.3f}  "
                f"active {open_blocks:.4g}/{self.blocks}"
            )
            if self.latest is not None:
                figures += (
                    f"  val {self.latest.validation_error:.2f}%"
                    f"  test {self.latest.test_error:.2f}%"
                    f"  {self.latest.images_per_second:,.0f} img/s"
                )
            lines.append(Text(figures, style="dim"))
        return Group(*lines)


class LiveDisplay(ABC):
    """Shows progress on a console while it is entered.

    Args:
        console: a terminal gets a live picture, anything else gets plain lines.
        quiet: whether to show nothing.
    """

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self.console, self.quiet = console, quiet
        self.live = console.is_terminal and not quiet
        self._picture: Live | None = None

    @abstractmethod
    def render(self) -> Group:
        """The live picture."""

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        if self.live:
            self._picture = Live(get_renderable=self.render, console=self.console, transient=True)
            self._picture.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._picture is not None:
            self._picture.stop()


class Display(LiveDisplay):
    """Shows runs while they train; without a live picture, as one line for each record."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        super().__init__(console, quiet)
        self.views: list[RunView] = []

    def show(self, label: str = "") -> RunView:
        """Begin to show a run, named `label` where several are shown."""
        view = RunView(label, self.say, live=self.live)
        self.views.append(view)
        return view

    def finish(self, view: RunView) -> None:
        """Stop showing a run."""
        self.views.remove(view)

    def render(self) -> Group:
        return Group(*(view.render(self.console.width) for view in self.views))
