"""One thread that turns the controller's wheel, and how other threads talk to it."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from mmrl_ray.errors import MMRLError, RolloutError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Pump:
    """Calls `turn` for ever on a thread of its own. What it raises is kept, and ends the run."""

    def __init__(self, turn: Callable[[], None]) -> None:
        self.changed = threading.Condition()
        """Guards what pump and callers share (its lock may be taken again by its holder); notified on every change."""
        self._turn = turn
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._woken = False
        self._failure: MMRLError | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="pump", daemon=True)

    @property
    def failure(self) -> MMRLError | None:
        """What ended the run, or None."""
        return self._failure

    def start(self) -> None:
        """Begins to turn."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Ends the thread after its present turn."""
        self._stopping = True
        self.wake()
        self._thread.join(timeout_s)

    def fail(self, error: Exception) -> None:
        """Ends the run with `error`; the first one counts."""
        with self.changed:
            if self._failure is None:
                wrapped = RolloutError(f"the rollout controller failed: {type(error).__name__}: {error}")
                self._failure = error if isinstance(error, MMRLError) else wrapped
                logger.error("rollout controller: %s", self._failure, exc_info=error)
            self.changed.notify_all()

    def check(self) -> None:
        """Raises what ended the run, if it has ended so."""
        if self._failure is not None:
            raise self._failure

    def wake(self) -> None:
        """Cuts a `rest` short, now or when it comes."""
        with self.changed:
            self._woken = True
            self.changed.notify_all()

    def rest(self, timeout_s: float) -> None:
        """For the turn: waits until somebody calls `wake` or `call`, at most `timeout_s`."""
        with self.changed:
            if not self._woken:
                self.changed.wait(timeout_s)
            self._woken = False

    def call(self, function: Callable[[], T], timeout_s: float) -> T:
        """Has the pump thread call `function` between two turns; returns or raises what it does.

        Not while holding `changed`.

        Raises:
            RolloutError: the pump did not get to it within `timeout_s`.
            MMRLError: the run had ended already.
        """
        future: Future[T] = Future()
        with self.changed:
            self.check()
            self._commands.append((function, future))
            self.wake()
        try:
            return future.result(timeout_s)
        except TimeoutError:
            future.cancel()
            raise RolloutError(f"the rollout controller did not answer within {timeout_s:g} s") from None

    def _work(self) -> None:
        try:
            while not self._stopping and self._failure is None:
                self._run_commands()
                self._turn()
        except Exception as error:  # noqa: BLE001 - the boundary of the thread: whatever it is ends the run
            self.fail(error)
        ended = self._failure or RolloutError("the rollout controller was stopped")
        with self.changed:
            self._failure = ended  # nothing would ever answer a later call
            commands = list(self._commands)
            self._commands.clear()
            self.changed.notify_all()
        for _, future in commands:
            if future.set_running_or_notify_cancel():
                future.set_exception(ended)

    def _run_commands(self) -> None:
        while self._commands:
            function, future = self._commands.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except Exception as error:  # noqa: BLE001 - belongs to whoever called
                future.set_exception(error)
