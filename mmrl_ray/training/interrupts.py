"""Ctrl-C and its like: the first finishes the step, checkpoints and stops; the second stops at once."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Self

from mmrl_ray.errors import MMRLError

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_S = 1.0
"""Signals so close together are one wish: `timeout` signals its child and then the child's group, a terminal that is
closed does so by its kernel and by its shell."""
_AGAIN_S = 0.01


_AGAIN = "Ctrl-C again stops at once"

_ELSEWHERE: dict[int, list[StopOnInterrupt]] = {}
"""By thread, of those that are not the main one: the blocks that it is in, the innermost last."""


def interrupt(thread: int) -> None:
    """Does to a thread of this process, which is not the main one, what a signal does to that: see `StopOnInterrupt`.

    Python raises there at the thread's next step in Python.
    """
    inside = _ELSEWHERE.get(thread)
    if not inside or inside[-1].hear():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(KeyboardInterrupt))


class StopOnInterrupt:
    """While inside, SIGINT, SIGTERM and SIGHUP call `stop` once instead of raising; the next raises KeyboardInterrupt.

    SIGINT is heard even where the process was started with it ignored or blocked, as in the background of a script:
    it is what `mmrl jobs stop` sends. SIGHUP stays ignored where it was: that is what `nohup` asks for. Signals belong
    to the main thread; on any other it is `interrupt` that is heard.

    A KeyboardInterrupt that is raised where Python drops exceptions (a `__del__` or a callback that happened to run) is
    raised again a moment later; one that a library drops itself is raised at the next `check`. Work that cannot be
    asked to stop, since `stop` raises an `MMRLError`, is stopped at once.
    """

    def __init__(
        self,
        stop: Callable[[], None] | None = None,
        *,
        awaited: Callable[[], str] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Without `stop` the first signal raises KeyboardInterrupt, too.

        Args:
            stop: asks the work to stop.
            awaited: what will still be finished, told to the user as soon as the signal comes.
            say: tells it, and that what is raised was heard; by default only what is awaited, on standard error.
        """
        self.asked = False
        """Whether a signal came."""
        self._stop = stop
        self._awaited = awaited
        self._say = say
        self._at_once = False
        self._heard = 0.0
        self._before: dict[int, object] = {}
        self._dropped = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                    continue
                self._before[number] = signal.signal(number, self._handle)
            self._hook, sys.unraisablehook = sys.unraisablehook, self._look_at_dropped
            self._blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, self._before)
        else:
            _ELSEWHERE.setdefault(threading.get_ident(), []).append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked)
            sys.unraisablehook = self._hook
        elif (inside := _ELSEWHERE.get(threading.get_ident())) is not None:
            inside.remove(self)
            if not inside:
                del _ELSEWHERE[threading.get_ident()]
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it nothing is worth being finished: the first signal raises KeyboardInterrupt, one from before too."""
        self._at_once = True
        try:
            if self.asked:
                raise KeyboardInterrupt
            yield
        finally:
            self._at_once = False

    def check(self) -> None:
        """Between two pieces of work: raises KeyboardInterrupt where one was raised before and nobody came to see it.

        C code that looks whether a module can be imported, for one, takes any exception for a no.
        """
        if self.asked and self._stop is None:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._dropped:
            self._dropped = False
            raise KeyboardInterrupt
        if self.asked and time.monotonic() - self._heard < SAME_S:
            return
        if self.hear():
            raise KeyboardInterrupt

    def hear(self) -> bool:
        """Takes in that the user wants it to stop; returns whether KeyboardInterrupt is to be raised in the block."""
        again, self.asked, self._heard = self.asked, True, time.monotonic()
        if again:
            return True
        # On a thread: what it calls may wait for the very thread that the signal has interrupted.
        is_raised = self._stop is None or self._at_once
        threading.Thread(target=self._ask, args=(is_raised,), name="stop", daemon=True).start()
        return is_raised

    def _ask(self, is_raised: bool) -> None:
        if is_raised:
            if self._say is not None:
                self._say(f"stopping: what was begun is cleared away; {_AGAIN}")
            return
        if self._awaited is not None:
            (self._say or _say)(f"stopping: {self._awaited()}; {_AGAIN}")
        if self._stop is not None:
            try:
                self._stop()
            except MMRLError:  # whom it asks is gone, by the same signal maybe
                if self._before:
                    self._raise_later()

    def _look_at_dropped(self, dropped: UnraisableHookArgs) -> None:
        if dropped.exc_type is not KeyboardInterrupt or threading.current_thread() is not threading.main_thread():
            self._hook(dropped)
            return
        self._raise_later()

    def _raise_later(self) -> None:
        """Raises KeyboardInterrupt in the main thread in a moment, when a hook that would drop it has returned."""
        self._dropped = True
        main = threading.main_thread().ident  # by a real signal, which wakes it if it waits by then
        again = threading.Timer(_AGAIN_S, signal.pthread_kill, (main, signal.SIGINT))
        again.daemon = True
        again.start()


def _say(line: str) -> None:
    with suppress(OSError):  # a terminal that was closed
        os.write(2, f"{line}\n".encode())  # takes no lock that the interrupted thread may hold
