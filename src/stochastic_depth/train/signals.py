"""Stop a run after the current step when the user or the system sends a signal."""

import signal
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, Self

STOPPING = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While entered, remembers a SIGINT or SIGTERM; calling the object returns its number, or None.

    A second signal takes effect at once, as it would without this.

    Args:
        numbers: the signals to remember.
    """

    def __init__(self, numbers: Sequence[int] = STOPPING) -> None:
        self._numbers = numbers
        self._received: int | None = None
        self._before: dict[int, Any] = {}

    def __call__(self) -> int | None:
        return self._received

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._remember) for number in self._numbers}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
