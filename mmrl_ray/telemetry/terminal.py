"""A run on the terminal: safe text, tables, and live progress (a moving line there, plain lines elsewhere).

Names and captions are shown as they are: no markup, no emoji codes, no control sequences, nothing that changes the
direction of text. Every table and every line that Rich prints goes through here.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from mmrl_ray.telemetry.notebook import Pane, in_notebook

_BIDIRECTIONAL = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
logger = logging.getLogger(__name__)

ProgressFn = Callable[[int, int, Mapping[str, float]], None]
"""(done, total, figures): what a long piece of work calls as it goes."""

_PLAIN_INTERVAL_S = 5.0
SILENT_S = 10.0
"""Nothing that goes on is silent for longer."""
_PANE_INTERVAL_S = 1.0
_LOOK_S = 0.5


def visible(text: str) -> str:
    """One line: line ends, control characters and marks that turn the direction of writing as their escapes."""
    return "".join(char.encode("unicode_escape").decode() if _is_hidden(char) else char for char in text)


def _is_hidden(char: str) -> bool:
    return char in _BIDIRECTIONAL or unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")


def plain(text: str, style: str = "") -> Text:
    """Text that is shown as it is, for a cell or a line."""
    return Text(visible(text), style=style)


def say(console: Console, text: str, style: str = "") -> None:
    """Prints one line, as long as it is."""
    console.print(plain(text, style), soft_wrap=True, highlight=False)


class PlainTable(Table):
    """A table whose title, headers and cells are shown as they are written."""

    def __init__(
        self,
        *columns: str,
        right: Collection[str] = (),
        title: str | None = None,
        caption: str | None = None,
        **settings: Any,
    ) -> None:
        """Numbers, in the columns named in `right`, are aligned there."""
        super().__init__(**settings)
        for column in columns:
            self.add_column(column, justify="right" if column in right else "left")
        self.title = None if title is None else plain(title, "table.title")
        self.caption = None if caption is None else plain(caption, "table.caption")

    def add_column(self, header: RenderableType = "", *args: Any, **settings: Any) -> None:
        """Rich's `Table.add_column`, whose header is shown as it is."""
        super().add_column(_cell(header), *args, **settings)

    def add_row(self, *cells: RenderableType | None, **settings: Any) -> None:
        """Rich's `Table.add_row`, whose cells are shown as they are."""
        super().add_row(*map(_cell, cells), **settings)


def _cell(value: Any) -> Any:
    return plain(value) if isinstance(value, str) else value


class RunProgress:
    """One line for each phase of a run, on standard error; figures of the newest step beside it.

    One phase is open at a time: the next closes it, and so does the end of the `busy` that it began in. On a terminal
    its bar moves; elsewhere a line comes whenever the work tells something, and at the latest after `SILENT_S`, however
    long a step or the loading of a model takes. In a notebook it is one output of the cell, whose last line moves.
    """

    def __init__(
        self, console: Console | None = None, *, as_log: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """With `as_log` its lines are lines of the log instead."""
        self._pane = Pane() if console is None and not as_log and in_notebook() else None
        self.console = console or Console(stderr=True, highlight=False)
        self._clock = clock
        self._start = clock()
        self._bars: Progress | None = None
        self._stack: list[_Phase] = []
        """What goes on: the last one, within those before it."""
        self._last_line = self._start
        self._as_log = as_log
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)

    def __enter__(self) -> Self:
        if self.console.is_terminal and not self._as_log and self._pane is None:
            self._bars = Progress(
                TextColumn("{task.description:<22}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[figures]}", markup=False),
                console=self.console,
                redirect_stdout=sys.stdout.isatty(),  # else what is printed to a file would come here
            )
            self._bars.start()
        else:
            if self._pane is not None:
                self._pane.open()
            self._ticker.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        while self._stack:
            self._close(self._stack[-1])
        if self._bars:
            self._bars.stop()
        if self._pane is not None:
            self._ticker.join()
            self._pane.close()

    def note(self, text: str) -> None:
        """Prints a line that stays."""
        self._say(logging.INFO, text)

    def warn(self, text: str) -> None:
        """A line that stays and is not overlooked."""
        self._say(logging.WARNING, text, "WARNING: ", "bold red")

    def _say(self, level: int, text: str, mark: str = "", style: str = "") -> None:
        self._last_line = self._clock()
        if self._as_log:
            logger.log(level, text)
        elif self._pane is not None:
            self._pane.say(visible(f"[{self._clock() - self._start:6.1f}s] {mark}{text}"))
        else:
            say(self.console, f"[{self._clock() - self._start:6.1f}s] {mark}{text}", style)

    def phase(self, name: str, *, lazily: bool = False) -> ProgressFn:
        """Begins a phase; the function it returns takes (done, total, figures), with a total of 0 where none is known.

        With `lazily` it begins when that is first called: of work that may turn out to be done already.
        """
        phase = None if lazily else self._begin_phase(name)

        def update(done: int, total: int, figures: Mapping[str, float]) -> None:
            nonlocal phase
            if phase is None:
                phase = self._begin_phase(name)
                phase.first = (done, phase.began)  # how long that took was not seen
            elif phase not in self._stack:  # something was done in between
                self._push(phase)
            phase.done, phase.total = done, total
            phase.figures = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
            now = self._clock()
            phase.moved(now)
            if self._bars and phase.task is not None:
                told = "  ".join(filter(None, (phase.left(now), phase.figures)))
                self._bars.update(phase.task, completed=done, total=total or None, figures=told)
            elif self._pane is not None:
                self._move(phase, now)
            elif done in (1, total) or now - self._last_line >= _PLAIN_INTERVAL_S:
                self.note(phase.line(now))
                sys.stderr.flush()
            if total and done >= total:
                self._close(phase)

        return update

    @contextmanager
    def busy(self, name: str) -> Iterator[None]:
        """Says that `name` goes on, where it takes long and tells nothing of itself; a phase within it goes first."""
        place = len(self._stack)
        phase = self._new(name, is_phase=False)
        self._push(phase)
        try:
            yield
        finally:
            while len(self._stack) > place:
                self._close(self._stack[-1])

    def tick(self) -> None:
        """Says where the open phase is, if nothing was said for `SILENT_S`."""
        stack = self._stack[-1:]  # the work goes on meanwhile
        now = self._clock()
        if stack and self._pane is not None:
            if now - self._last_line >= _PANE_INTERVAL_S:
                self._move(stack[0], now)
        elif stack and now - self._last_line >= SILENT_S - _LOOK_S:
            self.note(stack[0].line(now))
            sys.stderr.flush()

    def _move(self, phase: _Phase, now: float) -> None:
        assert self._pane is not None
        self._last_line = now
        self._pane.move(visible(f"[{now - self._start:6.1f}s] {phase.line(now)}"))

    def _tick(self) -> None:
        while not self._ended.wait(_LOOK_S):
            self.tick()

    def _begin_phase(self, name: str) -> _Phase:
        phase = self._new(name, is_phase=True)
        self._push(phase)
        if not self._bars and self._pane is None:
            self.note(name)
        return phase

    def _new(self, name: str, *, is_phase: bool) -> _Phase:
        task = self._bars.add_task(name, total=None, figures="", visible=False) if self._bars else None
        return _Phase(name, self._clock(), task, is_phase)

    def _push(self, phase: _Phase) -> None:
        """Has it go on: in place of an open phase, within what is busy."""
        if self._stack and self._stack[-1].is_phase and phase.is_phase:
            self._close(self._stack[-1])
        self._show(is_shown=False)
        self._stack.append(phase)
        self._show(is_shown=True)

    def _show(self, *, is_shown: bool) -> None:
        """Shows the bar of what goes on, or takes it away if it tells nothing that would be missed."""
        if self._bars and self._stack and (is_shown or not self._stack[-1].is_phase):
            task = self._stack[-1].task
            if task is not None and task in self._bars.task_ids:
                self._bars.update(task, visible=is_shown)

    def _close(self, phase: _Phase) -> None:
        """Its clock stops, and what it was within goes on; the bar of what told nothing of itself is taken away."""
        if phase not in self._stack:
            return
        self._stack.remove(phase)
        if self._pane is not None and phase.is_phase:
            self._pane.settle()
        if self._bars and phase.task is not None and phase.task in self._bars.task_ids:
            if phase.total and phase.is_phase:
                self._bars.stop_task(phase.task)
                self._bars.update(phase.task, figures=phase.figures)
            else:
                self._bars.remove_task(phase.task)
        self._show(is_shown=True)


@dataclass(slots=True)
class _Phase:
    """What goes on, and how far it is."""

    name: str
    began: float
    task: TaskID | None
    is_phase: bool
    """And not just something that takes time."""
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
            self.first = (0, self.began) if self.done <= 1 and now > self.began else (self.done, now)

    def line(self, now: float) -> str:
        """How far the phase is, as text."""
        if not self.total:
            counted = f"{self.done:,} done, " if self.done else ""
            return f"{self.name}: {counted}{now - self.began:.0f} s so far"
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
