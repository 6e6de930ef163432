"""The files by which a run says how it stands and is told to scale, and the thread that writes and reads them.

    status.json                       written whole about once a second while the run lives, and once when it ends
    control/scale-ID.json             a request: written whole by whoever may write the folder, taken away once applied
    control/scale-ID.answer.json      what the run said to it

So neither Ray nor its token is needed to look at a run or to scale it, and any file system of `pyarrow.fs` will do.
`StatusWriter`, the thread, never ends a run: a status that cannot be written is a line in the log, a request that
cannot be read is refused.
"""

from __future__ import annotations

import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import Field, ValidationError

from mmrl_ray.config.sections import Section
from mmrl_ray.errors import ConfigError, MMRLError, RunError
from mmrl_ray.run_records.run_dir import RunDir

STATUS_FILE = "status.json"
CONTROL_FOLDER = "control"
MAX_WORKERS = 100_000
_FORMAT = 1
_HEAD = ("format", "run", "state", "time", "next_within_s")
_REQUEST = re.compile(r"scale-[0-9a-f]{32}\.json")
_REQUEST_BYTES = 4096

STARTING_S = 1200.0
"""For a run to say more than that it is starting: its Ray, its model and its workers come up."""
ENDING_S = 600.0
"""For a run that has learnt to write what it leaves."""
logger = logging.getLogger(__name__)

_LOCAL_S = 1.0
_REMOTE_S = 5.0
"""An object store is asked less often: each look and each word costs a request."""
_MISSED = 15
"""Turns that may fail to come before readers take the run for dead: a busy machine makes one wait."""


class ScaleRequest(Section):
    """How many rollout workers a run should have."""

    workers: int | None = Field(..., ge=1, le=MAX_WORKERS)
    """None: as the run itself sees fit, within its bounds."""
    by: str = Field("", max_length=200)
    """Who asks, for the record."""
    expires: float
    """Unix time after which whoever asked has given up."""


class ScaleAnswer(Section):
    """What a run said to a request."""

    accepted: bool
    message: str
    target: int | None = None
    """Workers there will be; None where the request was refused."""
    number: int = 0
    """Which of the run's accepted requests this is; `scaling.requests` of a status that knows of it is no smaller."""


def write_status(run: RunDir, state: str, next_within_s: float, facts: Mapping[str, Any] | None = None) -> None:
    """Replaces the run's status.

    Args:
        state: `starting`, `running` or `ending`; `finished`, `interrupted` or `failed` when nothing comes after it.
        next_within_s: a run whose status was not written again by then has died.
        facts: JSON-able.

    Raises:
        RunError: the run folder cannot be written.
    """
    values = (_FORMAT, run.name, state, time.time(), next_within_s)
    run.write_json(STATUS_FILE, {**(facts or {}), **dict(zip(_HEAD, values, strict=True))})


def read_status(run: RunDir) -> dict[str, Any]:
    """The newest status.

    Raises:
        RunError: there is none, or it is of another version of this program.
    """
    if not run.exists(STATUS_FILE):
        raise RunError(f"{run.location} has no {STATUS_FILE}: it has not got that far, or is of an older version")
    status = run.read_json(STATUS_FILE)
    if not isinstance(status, dict) or status.get("format") != _FORMAT:
        raise RunError(f"{run.full_path(STATUS_FILE)} is of another version of this program: use the one of the run")
    return status


def conclude_status(run: RunDir, how: str) -> None:
    """The last status of a run: `how` it ended, as its summary says it, with the figures that it had.

    Raises:
        RunError: the run folder cannot be written.
    """
    try:
        last = read_status(run)
    except RunError:
        last = {}
    facts = {name: value for name, value in last.items() if name not in _HEAD}
    state, _, why = how.partition(": ")
    write_status(run, state, 0.0, {**facts, "waiting": "nobody", "error": why or None})


def put_request(run: RunDir, request: ScaleRequest) -> str:
    """Hands a request to the run; returns its name."""
    name = f"{CONTROL_FOLDER}/scale-{uuid.uuid4().hex}.json"
    run.write_text(name, request.model_dump_json() + "\n")
    return name


def pending_requests(run: RunDir) -> list[str]:
    """Names of requests that were not answered yet."""
    return [f"{CONTROL_FOLDER}/{name}" for name in run.list(CONTROL_FOLDER) if _REQUEST.fullmatch(name)]


def read_request(run: RunDir, name: str) -> ScaleRequest:
    """A request; a ConfigError where it is none."""
    try:
        raw = run.read_bytes(name)
        if len(raw) > _REQUEST_BYTES:
            raise ConfigError(f"{name} has {len(raw):,} bytes, a request has {_REQUEST_BYTES:,} at most")
        return ScaleRequest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "it"
        raise ConfigError(f"{name} is no scale request: {place}: {first['msg']}") from None
    except RunError as error:
        raise ConfigError(str(error)) from error


def put_answer(run: RunDir, request: str, answer: ScaleAnswer) -> None:
    """Answers a request and takes it away: whatever happens in between, it is answered."""
    run.write_text(_answer_name(request), answer.model_dump_json() + "\n")
    run.delete(request)


def take_answer(run: RunDir, request: str) -> ScaleAnswer | None:
    """The answer to a request, which is taken away; None while there is none."""
    name = _answer_name(request)
    if not run.exists(name):
        return None
    answer = ScaleAnswer.model_validate_json(run.read_bytes(name))
    run.delete(name)
    return answer


def _answer_name(request: str) -> str:
    return f"{request.removesuffix('.json')}.answer.json"


class StatusWriter:
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
        """Starts the thread."""
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
