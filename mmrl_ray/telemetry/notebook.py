"""What a notebook shows of work that goes on: one output of a cell, whose last line moves. No Jupyter, no trouble."""

from __future__ import annotations

import sys
import threading
from collections import deque
from html import escape
from typing import Any

_KEPT = 200
"""Lines; a run of days shows its last ones."""


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook. IPython on a terminal is none: it has a terminal's bars."""
    if "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return shell is not None and hasattr(shell, "kernel")


def show_html(html: str, plain: str) -> None:
    """Puts a piece of HTML where the cell's output is; `plain` where that cannot be shown."""
    from IPython.display import display

    display({"text/html": html, "text/plain": plain}, raw=True)


class Pane:
    """Lines that stay and one that moves, in a place of their own in the output of the cell that began it."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=_KEPT)
        self._moving = ""
        self._handle: Any = None
        self._lock = threading.Lock()

    def open(self) -> None:
        """Takes its place. To be called where the cell runs: other threads may outlive it."""
        with self._lock:
            self._show()

    def close(self) -> None:
        """Nothing moves any more; where nothing was said, nothing is left to see."""
        with self._lock:
            self._moving = ""
            self._show()

    def say(self, line: str) -> None:
        """A line that stays, in place of the one that moves."""
        with self._lock:
            self._lines.append(line)
            self._moving = ""
            self._show()

    def move(self, line: str) -> None:
        """The line that moves."""
        with self._lock:
            self._moving = line
            self._show()

    def settle(self) -> None:
        """The line that moves stays as it is now."""
        if self._moving:
            self.say(self._moving)

    def _show(self) -> None:
        from IPython.display import display

        text = "\n".join([*self._lines, *filter(None, [self._moving])])
        html = f'<pre style="white-space:pre-wrap;margin:0">{escape(text)}</pre>'
        shown = {"text/html": html, "text/plain": text}
        if self._handle is None:
            self._handle = display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)
