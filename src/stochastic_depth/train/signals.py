"""Ctrl-C and `kill` as a request to stop at the next step."""

import signal
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, Self

STOPPING = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While entered, SIGINT and SIGTERM are remembered; called, it tells which came, if any.

    A second signal acts at once, as it would have without this.

    Args:
        numbers: the signals, where others are meant.
    """

    def __init__(self, numbers: Sequence[int] = STOPPING) -> None:
        self._numbers = numbers
        self._came: int | None = None
        self._before: dict[int, Any] = {}

    def __call__(self) -> int | None:
        return self._came

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
        self._came = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
