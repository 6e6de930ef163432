"""Live progress: a moving line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from mmrl_ray.telemetry.terminal import say

logger = logging.getLogger(__name__)

ProgressFn = Callable[[int, int, Mapping[str, float]], None]
"""(done, total, figures): what a long piece of work calls as it goes."""

_PLAIN_INTERVAL_S = 5.0
SILENT_S = 10.0
"""Nothing that goes on is silent for longer."""
_LOOK_S = 0.5


class RunProgress:
    """One line for each phase of a run, on standard error; figures of the newest step beside it.

    One phase is open at a time: the next closes it. On a terminal its bar moves; elsewhere a line comes whenever the
    work tells something, and at the latest after `SILENT_S`, however long a step or the loading of a model takes.
    """

    def __init__(
        self, console: Console | None = None, *, as_log: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """With `as_log` its lines are lines of the log instead."""
        self.console = console or Console(stderr=True, highlight=False)
        self._clock = clock
        self._start = clock()
        self._bars: Progress | None = None
        self._open: _Phase | None = None
        self._last_line = self._start
        self._as_log = as_log
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)

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
        else:
            self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._close(self._open)
        if self._bars:
            self._bars.stop()

    def note(self, text: str) -> None:
        """A line that stays."""
        self._last_line = self._clock()
        if self._as_log:
            logger.info(text)
            return
        say(self.console, f"[{self._clock() - self._start:6.1f}s] {text}")

    def warn(self, text: str) -> None:
        """A line that stays and is not overlooked."""
        self._last_line = self._clock()
        if self._as_log:
            logger.warning(text)
            return
        say(self.console, f"[{self._clock() - self._start:6.1f}s] WARNING: {text}", "bold red")

    def phase(self, name: str) -> ProgressFn:
        """Begins a phase; the function it returns takes (done, total, figures)."""
        phase = self._begin(name)
        if not self._bars:
            self.note(name)

        def update(done: int, total: int, figures: Mapping[str, float]) -> None:
            if self._open is not phase:  # something was done in between
                self._close(self._open)
                self._open = phase
            phase.done, phase.total = done, total
            phase.figures = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
            now = self._clock()
            phase.moved(now)
            if self._bars and phase.task is not None:
                told = "  ".join(filter(None, (phase.left(now), phase.figures)))
                self._bars.update(phase.task, completed=done, total=total, figures=told)
            elif done in (1, total) or now - self._last_line >= _PLAIN_INTERVAL_S:
                self.note(phase.line(now))
                sys.stderr.flush()
            if done >= total:
                self._close(phase)

        return update

    @contextmanager
    def busy(self, name: str) -> Iterator[None]:
        """Says that `name` goes on, where it takes long and tells nothing of itself; a phase within it goes first."""
        before, phase = self._open, self._begin(name, closes=False)
        try:
            yield
        finally:
            self._close(phase, forget=True)
            if self._open in (None, phase):
                self._open = before

    def tick(self) -> None:
        """Says where the open phase is, if nothing was said for `SILENT_S`."""
        now, phase = self._clock(), self._open
        if phase is not None and now - self._last_line >= SILENT_S - _LOOK_S:
            self.note(phase.line(now))
            sys.stderr.flush()

    def _tick(self) -> None:
        while not self._ended.wait(_LOOK_S):
            self.tick()

    def _begin(self, name: str, *, closes: bool = True) -> _Phase:
        if closes:
            self._close(self._open)
        task = self._bars.add_task(name, total=None, figures="") if self._bars else None
        self._open = _Phase(name, self._clock(), task)
        return self._open

    def _close(self, phase: _Phase | None, *, forget: bool = False) -> None:
        """Its clock stops; `forget` takes its bar away."""
        if phase is None:
            return
        if self._bars and phase.task is not None and phase.task in self._bars.task_ids:
            if forget:
                self._bars.remove_task(phase.task)
            else:
                self._bars.stop_task(phase.task)
        if self._open is phase:
            self._open = None


@dataclass(slots=True)
class _Phase:
    """What goes on, and how far it is."""

    name: str
    began: float
    task: TaskID | None
    done: int = 0
    total: int = 0
    figures: str = ""
    first: tuple[int, float] | None = None
    """Where it was when it first told, and when: what is resumed does not begin at 0."""
    last: float = 0.0
    """When a step was last done."""
    seen: int = -1

    def moved(self, now: float) -> None:
        """Notes when steps were done."""
        if self.done != self.seen:
            self.seen, self.last = self.done, now
        if self.first is None:
            # A first call that tells of one step tells of its time, too; else steps count from here on.
            self.first = (0, self.began) if self.done <= 1 else (self.done, now)

    def line(self, now: float) -> str:
        """Where it is."""
        if not self.total:
            return f"{self.name}: {now - self.began:.0f} s so far"
        since = f"{now - self.last:.0f} s in this step" if now - self.last >= SILENT_S / 2 else ""
        told = "  ".join(filter(None, (self.left(now), self.figures, since)))
        return f"{self.name} {self.done}/{self.total}  {told}".rstrip()

    def left(self, now: float) -> str:
        """The time that the rest takes at the pace so far; empty while there is none, or nothing is left."""
        if self.first is None or self.done <= self.first[0] or self.done >= self.total:
            return ""
        pace = (self.last - self.first[1]) / (self.done - self.first[0])
        seconds = max(0.0, pace * (self.total - self.done) - (now - self.last))
        return f"{_clock(seconds)} left"


def _clock(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, minutes = divmod((whole + 30) // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
