"""The thread that speaks for a run: writes `status.json`, and hands over what lies in `control/`.

It never ends a run: a status that cannot be written is a line in the log, a request that cannot be read is refused.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from mmrl_ray.errors import ConfigError, MMRLError
from mmrl_ray.rollouts.control_files import (
    ENDING_S,
    ScaleAnswer,
    pending_requests,
    put_answer,
    read_request,
    write_status,
)
from mmrl_ray.run_dir import RunDir

logger = logging.getLogger(__name__)

_LOCAL_S = 1.0
_REMOTE_S = 5.0
"""An object store is asked less often: each look and each word costs a request."""
_MISSED = 15
"""Turns that may fail to come before readers take the run for dead: a busy machine makes one wait."""


class StatusDesk:
    """Its owner says how things stand and takes requests; both are called from this thread."""

    def __init__(
        self,
        run: RunDir,
        status: Callable[[], Mapping[str, Any]],
        scale: Callable[[int | None, str], ScaleAnswer],
        note: Callable[[dict[str, Any]], None],
    ) -> None:
        """`scale` takes (workers or None, who asks); `note` writes an event."""
        self._run, self._status, self._scale, self._note = run, status, scale, note
        self._period_s = _LOCAL_S if run.is_local else _REMOTE_S
        self._closing = threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._work, name="status", daemon=True)

    def start(self) -> None:
        """Begins to speak."""
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Says that the run is about to end, and nothing more."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def turn(self) -> None:
        """Answers every request, then tells how things stand."""
        for name in pending_requests(self._run):
            put_answer(self._run, name, self._answer(name))
        write_status(self._run, "running", _MISSED * self._period_s, self._status())

    def _work(self) -> None:
        while not self._closing.is_set():
            self._safely(self.turn)
            self._closing.wait(self._period_s)
        self._safely(lambda: write_status(self._run, "ending", ENDING_S, self._status()))

    def _safely(self, work: Callable[[], None]) -> None:
        try:
            work()
            self._failing = False
        except Exception as error:
            if not self._failing:
                known = isinstance(error, MMRLError)
                logger.warning("the run's status is not written: %s", error, exc_info=None if known else error)
            self._failing = True

    def _answer(self, name: str) -> ScaleAnswer:
        try:
            request = read_request(self._run, name)
            if request.expires < time.time():
                raise ConfigError("the request has expired: whoever sent it has given up")
            return self._scale(request.workers, request.by or "somebody")
        except MMRLError as error:
            self._note({"kind": "scale_refused", "request": name, "detail": str(error)})
            return ScaleAnswer(accepted=False, message=str(error))
