"""Live progress: a moving line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from mmrl_ray.telemetry.terminal import say

logger = logging.getLogger(__name__)

ProgressFn = Callable[[int, int, Mapping[str, float]], None]
"""(done, total, figures): what a long piece of work calls as it goes."""

_PLAIN_INTERVAL_S = 5.0


class RunProgress:
    """One line for each phase of a run, on standard error; figures of the newest step beside it."""

    def __init__(self, console: Console | None = None, *, as_log: bool = False) -> None:
        """With `as_log` its lines are lines of the log instead."""
        self.console = console or Console(stderr=True, highlight=False)
        self._start = time.monotonic()
        self._bars: Progress | None = None
        self._task: TaskID | None = None
        self._last_plain = 0.0
        self._as_log = as_log

    def __enter__(self) -> Self:
        if self.console.is_terminal and not self._as_log:
            self._bars = Progress(
                TextColumn("{task.description:<22}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[figures]}", markup=False),
                console=self.console,
            )
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()

    def note(self, text: str) -> None:
        """A line that stays."""
        if self._as_log:
            logger.info(text)
            return
        say(self.console, f"[{time.monotonic() - self._start:6.1f}s] {text}")

    def warn(self, text: str) -> None:
        """A line that stays and is not overlooked."""
        if self._as_log:
            logger.warning(text)
            return
        say(self.console, f"[{time.monotonic() - self._start:6.1f}s] WARNING: {text}", "bold red")

    def phase(self, name: str) -> ProgressFn:
        """Begins a phase; the function it returns takes (done, total, figures)."""
        if self._bars:
            self._task = self._bars.add_task(name, total=None, figures="")
        else:
            self.note(name)
        self._last_plain = time.monotonic()
        task = self._task

        def update(done: int, total: int, figures: Mapping[str, float]) -> None:
            text = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
            if self._bars and task is not None:
                self._bars.update(task, completed=done, total=total, figures=text)
                return
            now = time.monotonic()
            if done in (1, total) or now - self._last_plain >= _PLAIN_INTERVAL_S:
                self._last_plain = now
                self.note(f"{name} {done}/{total}  {text}")
                sys.stderr.flush()

        return update
