"""Ctrl-C: the first finishes the step, checkpoints and stops; the second stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self


class StopOnInterrupt:
    """While inside, SIGINT and SIGTERM call `stop` once instead of raising; the next one raises KeyboardInterrupt.

    Signals belong to the main thread; on any other this does nothing.
    """

    def __init__(self, stop: Callable[[], None]) -> None:
        self.asked = False
        """Whether a signal came."""
        self._stop = stop
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        # On a thread: what it calls may wait for the very thread that the signal has interrupted.
        threading.Thread(target=self._stop, name="stop", daemon=True).start()
