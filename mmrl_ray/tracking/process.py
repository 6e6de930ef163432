"""The owner's side of one tracker: its process, what it is asked, and what it prints. `child.py` is the other side.

Keys and passwords are taken out of whatever it says: no event, log or error message has them.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import threading
from collections.abc import Mapping
from typing import Any

from mmrl_ray.errors import MMRLError, ProcessError, TrackerError
from mmrl_ray.processes import ChildProcess, Lost
from mmrl_ray.tracking.base import About

Call = tuple[str, tuple[Any, ...]]
"""A method of `Tracker`, and its arguments."""
_WORKER = "mmrl_ray.tracking.child:work"
_START_S = 120.0
"""For the library to be imported, on a busy machine."""
_KEPT = 64 * 1024
"""Bytes of what it prints."""

_NAMES = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_SHORTEST = 6
"""Characters; shorter values are words of any text."""
_USER_INFO = re.compile(r"(\w[\w+.-]*://)[^\s/@]+@")
_BEARER = re.compile(r"(authorization['\"]?\s*[:=]\s*['\"]?(?:bearer|basic)\s+)[^\s'\"]+", re.IGNORECASE)
_KEYS = re.compile(r"\bhf_[A-Za-z0-9]{16,}|\bwandb_v\d_\w{16,}|\b[0-9a-f]{40}\b")
"""As the Hub and W&B make them."""
_QUERY = re.compile(r"([?&][\w-]*(?:token|key|secret|password)=)[^&\s'\"]+", re.IGNORECASE)
HIDDEN = "***"
"""Stands where a secret was."""


class TrackerFailure(MMRLError):
    """A tracker did not do what it was asked. The message has no secrets."""

    def __init__(self, reason: str, *, is_lost: bool = False, is_expected: bool = False) -> None:
        super().__init__(redact(reason))
        self.is_lost = is_lost
        """Whether its process is no more: it hung, or ended by itself."""
        self.is_expected = is_expected
        """Whether the tracker itself says what to do about it."""


class TrackerProcess:
    """One tracker, made anew in a new process whenever the old one is gone. Of one thread, but for `end`."""

    def __init__(self, name: str, options: Mapping[str, Any], timeout_s: float) -> None:
        """`timeout_s` is for one request."""
        self.name = name
        self.rewinds = False
        """Of its class; known once it has started."""
        self._options, self._timeout_s = options, timeout_s
        self._process: ChildProcess | None = None
        self._printed = bytearray()
        self._ended = False

    @property
    def alive(self) -> bool:
        """Whether there is a process."""
        return not self._ended and self._process is not None and self._process.alive

    def start(self, about: About) -> None:
        """Makes the tracker in a process of its own.

        Raises:
            TrackerFailure: it cannot be.
        """
        reading, writing = os.pipe()
        try:
            self._process = ChildProcess(_WORKER, f"tracker {self.name}", output=writing)
        except ProcessError as error:
            os.close(reading)
            raise TrackerFailure(str(error), is_lost=True) from error
        finally:
            os.close(writing)
        threading.Thread(target=self._keep, args=(reading,), name=f"{self.name} prints", daemon=True).start()
        if self._ended:  # meanwhile, by another thread
            self._process.kill()
        answer = self._ask((self.name, about, self._options), max(_START_S, self._timeout_s))
        self.rewinds = bool(answer.get("rewinds"))

    def call(self, method: str, *arguments: Any, patience: float = 1.0) -> Any:
        """Has it do this; returns what that gives. `patience` is a factor of the time it has.

        Raises:
            TrackerFailure: it raised, or did not come to an end in time.
        """
        return self._ask((method, arguments), self._timeout_s * patience).get("value")

    def end(self) -> None:
        """Ends the process, whatever it is at; may be called by another thread."""
        self._ended = True
        if self._process is not None:
            self._process.kill()

    def printed(self) -> str:
        """The end of what it wrote to standard output and error, without secrets."""
        return redact(bytes(self._printed).decode(errors="replace"))

    def _ask(self, request: Any, timeout_s: float) -> dict[str, Any]:
        assert self._process is not None
        answer = self._process.ask(pickle.dumps(request), timeout_s=timeout_s)
        if isinstance(answer, Lost):
            self._process = None
            raise TrackerFailure(answer.reason, is_lost=True)
        found: dict[str, Any] = json.loads(answer)
        if "error" in found:
            raise TrackerFailure(found["error"], is_expected=bool(found["expected"]))
        return found

    def _keep(self, reading: int) -> None:
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            while piece := pipe.read(_KEPT):
                self._printed += piece
                del self._printed[:-_KEPT]


def checked(name: str, options: Mapping[str, Any], about: About, timeout_s: float) -> str:
    """Whether a tracker can be used; where the run will be found there, in words.

    Raises:
        TrackerError: it cannot, and what to do about it.
    """
    process = TrackerProcess(name, options, timeout_s)
    try:
        process.start(about)
        return redact(str(process.call("check") or ""))
    except TrackerFailure as failure:
        raise as_error(name, failure) from failure
    finally:
        process.end()


def as_error(name: str, failure: TrackerFailure) -> TrackerError:
    """What failed at the start, as the project's own."""
    remedy = "" if failure.is_expected else "; mend it, or take it out of `tracking`"
    said = str(failure)
    return TrackerError(said if said.startswith("tracking: ") else f"tracking: {name}: {said}{remedy}")


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """`text` without keys and passwords: values of variables of the environment that are called so, and credentials of
    addresses."""
    values = (os.environ if environment is None else environment).items()
    for value in sorted({v for n, v in values if _NAMES.search(n) and len(v) >= _SHORTEST}, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    for pattern in (_USER_INFO, _BEARER, _QUERY):
        text = pattern.sub(rf"\1{HIDDEN}" + ("@" if pattern is _USER_INFO else ""), text)
    return _KEYS.sub(HIDDEN, text)
