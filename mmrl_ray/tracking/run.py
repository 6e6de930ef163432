"""All trackers of a run: each a thread here, and a process that has the library. No error of one is one of the run's.

    run folder ─▶ `Feed` ─▶ thread ──pipe──▶ process: `Tracker`
                              │  raises: tried again, later and later; left out where the tracker answers otherwise
                              └  hangs, dies: its process is ended, a new one goes on with the same id

What goes wrong is an event: `tracker_failed`, `tracker_back`, `tracker_left_out`, `tracker_behind` when the run ended.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol

from mmrl_ray.config import Config
from mmrl_ray.errors import MMRLError, TrackerError, one_line
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.run_records.step_log import note_event
from mmrl_ray.tracking.base import About
from mmrl_ray.tracking.feed import Feed, progress_name
from mmrl_ray.tracking.process import TrackerFailure, TrackerProcess, as_error, redact
from mmrl_ray.tracking.registry import options_of

logger = logging.getLogger(__name__)

_LOCAL_S = 1.0
_REMOTE_S = 10.0
"""An object store is asked less often."""
_FIRST_PAUSE_S = 2.0
_LONGEST_PAUSE_S = 300.0
_LAST_PAUSE_S = 1.0
"""When the run has ended."""
_TRIES = 3
"""Of one item, where the tracker can be reached otherwise."""
_MOST_EVENTS = 50
"""Of one tracker in one life of the run."""
_JOIN_S = 10.0


class Says(Protocol):
    """Where a run tells a person something (`RunProgress`)."""

    def note(self, text: str, /) -> None:
        """A line."""

    def warn(self, text: str, /) -> None:
        """A line that stands out."""


def trackers_of(cfg: Config, *, is_local: bool) -> list[str]:
    """Those that the run has. TensorBoard's files need a run folder on this machine, and nobody has to take it out."""
    return [name for name in cfg.tracking.to if is_local or name != "tensorboard"]


def about_of(cfg: Config, folder: str | None, id: str | None = None) -> About:
    """The run, as trackers are told of it."""
    return About(cfg.run.name, cfg.tracking.project, _without_secrets(cfg.model_dump(mode="json")), folder, id)


def _without_secrets(value: Any) -> Any:
    """A config leaves this machine here: an address of a store may have a password."""
    if isinstance(value, dict):
        return {key: _without_secrets(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_secrets(each) for each in value]
    return redact(value) if isinstance(value, str) else value


class Tracking:
    """From `check` to `finish`; `close` ends what is left, wherever the run is."""

    def __init__(self, cfg: Config, run: RunDir, say: Says, *, pause_s: float = _FIRST_PAUSE_S) -> None:
        """`pause_s` goes by before what failed is tried again, and twice as much each further time."""
        period_s = _LOCAL_S if run.is_local else _REMOTE_S
        names = trackers_of(cfg, is_local=run.is_local)
        self._finish_s = cfg.tracking.finish_s
        self._say = say
        self._tracked = [_Tracked(name, cfg, run, say, period_s, pause_s) for name in names]

    def check(self, *, is_resumed: bool) -> None:
        """Whether each can be used; says where the run will be found. Their processes stay.

        Raises:
            TrackerError: one of a new run's cannot. One of a resumed run is tried again while it runs.
        """
        with ThreadPoolExecutor(max(1, len(self._tracked))) as pool:
            found = list(pool.map(_Tracked.check, self._tracked))
        errors = [error for error in found if isinstance(error, TrackerError)]
        if errors and not is_resumed:
            raise TrackerError("\n".join(map(str, errors)))
        for error in errors:
            self._say.warn(str(error))

    def start(self, cfg: Config) -> None:
        """The run begins, or goes on; `cfg` is as it will be written down."""
        for tracked in self._tracked:
            tracked.start(cfg)

    def finish(self, *, failed: bool, within_s: float | None = None) -> None:
        """The run has ended: returns when all have all of it, or `tracking.finish_s` (or less) has gone by."""
        deadline = time.monotonic() + min(self._finish_s, math.inf if within_s is None else within_s)
        for tracked in self._tracked:
            tracked.finish(failed, deadline)
        for tracked in self._tracked:
            tracked.wait(deadline)

    def close(self) -> None:
        """Ends all processes, at once."""
        for tracked in self._tracked:
            tracked.close()


class _Tracked:
    """One tracker of a run."""

    def __init__(self, name: str, cfg: Config, run: RunDir, say: Says, period_s: float, pause_s: float) -> None:
        self.name = name
        self._cfg, self._run, self._say = cfg, run, say
        self._period_s, self._pause_s = period_s, pause_s
        self._process = self._made()
        self._feed: Feed | None = None
        self._is_open = False
        self._failing: str | None = None
        """Why, while it does not do what it is asked."""
        self._failures = 0
        """In a row."""
        self._events = 0
        self._woken, self._closing = threading.Event(), threading.Event()
        self._ends: float | None = None
        """When the run stops waiting, once it has ended."""
        self._failed = False
        self._concluded = False
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)

    # -- for the run -----------------------------------------------------------------------------------------------

    def check(self) -> TrackerError | None:
        """What is wrong; says where the run will be found otherwise. TensorBoard is always there."""
        if self.name == "tensorboard":
            return None
        try:
            self._process.start(self._about(None))
            where = str(self._process.call("check") or "")
        except TrackerFailure as failure:
            self._process.end()
            return as_error(self.name, failure)
        if where:
            self._say.note(f"tracking: {self.name}: {where}")
        return None

    def start(self, cfg: Config) -> None:
        """Begins to tell."""
        self._cfg = cfg
        if not self._process.alive:  # none was needed, or the one that was checked cannot be used
            self._process = self._made()
        with suppress(MMRLError):  # storage that fails for a while: the thread looks again
            self._feed = Feed(self._run, self.name, cfg)
        self._thread.start()

    def finish(self, failed: bool, deadline: float) -> None:
        """The run has ended; returns at once."""
        self._failed, self._ends = failed, deadline
        self._woken.set()

    def wait(self, deadline: float) -> None:
        """Returns when all is told, or the deadline has passed: then it says so, and ends the process."""
        if self._thread.ident is None:
            return
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            steps = 0 if self._feed is None else self._feed.progress.next_step
            why = self._failing or "it is slow"
            self._event("tracker_behind", detail=f"{why}; it has {steps} steps of the run", is_warning=True)
            self.close()
        self._keep_printed()

    def close(self) -> None:
        """Ends thread and process."""
        self._closing.set()
        self._woken.set()
        self._process.end()
        if self._thread.ident is not None:
            self._thread.join(_JOIN_S)

    # -- the thread ------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._closing.is_set():
            try:
                if self._turn():
                    return
            except TrackerFailure as failure:
                if self._closing.is_set():
                    return
                self._take(failure)
            except MMRLError as error:  # of the run folder: whoever writes results there says it
                self._failed_with(str(error))
            except Exception as error:  # the boundary of the thread: no tracker ends a run
                logger.warning("tracker %s", self.name, exc_info=error)
                self._failed_with(f"{type(error).__name__}: {one_line(error)}")

    def _turn(self) -> bool:
        """Tells what there is to tell; whether that was the last."""
        is_ending = self._ends is not None
        if self._feed is None:
            self._feed = Feed(self._run, self.name, self._cfg)
        feed = self._feed
        if not self._process.alive or not self._is_open:
            self._open(feed)
        feed.fill(rewinds=self._process.rewinds)
        if is_ending and not self._concluded:
            feed.finish()
            self._concluded = True
        if feed.item is not None:
            try:
                self._tell(feed)
            finally:
                feed.save()
        if is_ending:
            self._process.call("close", self._failed, patience=2.0)
            self._process.end()
            return True
        self._woken.wait(self._period_s)
        self._woken.clear()
        return False

    def _tell(self, feed: Feed) -> None:
        """One call after the other: where the process is lost, at most one is told twice."""
        while (item := feed.item) is not None and not self._closing.is_set():
            for method, arguments in item.calls[item.done :]:
                self._process.call(method, *arguments, patience=item.patience)
                item.done += 1
            feed.told()
            self._worked()

    def _open(self, feed: Feed) -> None:
        self._is_open = False
        about = self._about(feed.progress.id)
        if not self._process.alive:
            self._process.start(about)
        self._process.call("about", about)  # the one that was checked knew neither the id nor the config as it is now
        id = self._process.call("open")
        feed.opened(None if id is None else str(id), self._process.call("next_step"))
        self._is_open = True

    def _made(self) -> TrackerProcess:
        tracking = self._cfg.tracking
        return TrackerProcess(self.name, options_of(tracking, self.name), tracking.timeout_s)

    def _about(self, id: str | None) -> About:
        return about_of(self._cfg, str(self._run.local_path()) if self._run.is_local else None, id)

    # -- what goes wrong -------------------------------------------------------------------------------------------

    def _take(self, failure: TrackerFailure) -> None:
        """What a call that failed means for what it was to tell."""
        feed, reason = self._feed, str(failure)
        was_open = self._is_open
        if failure.is_lost:
            self._is_open = False
        if was_open and feed is not None and (item := feed.item) is not None:
            item.tries += 1
            if item.tries >= _TRIES and self._answers(feed):
                feed.told()
                self._event("tracker_left_out", detail=f"{item.what}: {reason}", is_warning=True)
                return
        self._failed_with(reason)

    def _answers(self, feed: Feed) -> bool:
        """Whether the tracker can be used otherwise."""
        try:
            if not self._process.alive:
                self._open(feed)
            self._process.call("check")
        except TrackerFailure:
            self._is_open = self._is_open and self._process.alive
            return False
        return True

    def _failed_with(self, reason: str) -> None:
        """Says it once, and waits a while."""
        if reason != self._failing:
            self._failing = reason
            self._event("tracker_failed", detail=reason, is_warning=True)
            self._keep_printed()
        pause = min(self._pause_s * 2**self._failures, _LONGEST_PAUSE_S)
        self._failures = min(self._failures + 1, 30)
        until = time.monotonic() + pause
        while not self._closing.is_set() and (left := until - time.monotonic()) > 0:
            if self._ends is not None:
                left = min(left, _LAST_PAUSE_S)
                until = min(until, time.monotonic() + left)
            self._woken.wait(left)
            self._woken.clear()

    def _worked(self) -> None:
        if self._failing is not None:
            self._event("tracker_back", detail="it is told again, from where it was", is_warning=False)
        self._failing, self._failures = None, 0

    def _event(self, kind: str, *, detail: str, is_warning: bool) -> None:
        self._events += 1
        if self._events > _MOST_EVENTS:
            return
        told: Mapping[str, Any] = {"tracker": self.name, "detail": detail}
        say: Callable[[str], None] = self._say.warn if is_warning else self._say.note
        say(f"tracking: {self.name}: {detail}; the run goes on" if is_warning else f"tracking: {self.name}: {detail}")
        try:
            note_event(self._run, kind, **told)
        except MMRLError as error:
            logger.warning("event %s of tracker %s is not written: %s", kind, self.name, error)

    def _keep_printed(self) -> None:
        """What the tracker wrote, where something went wrong."""
        text = self._process.printed()
        if text and self._events:
            try:
                self._run.write_text(progress_name(self.name, ".log"), text)
            except MMRLError as error:
                logger.warning("%s", error)
