"""What runs in the process of a tracker, see `process.py`.

Requests are pickled by the owner; answers are JSON, so that nothing that a library or a user's class made is ever
unpickled by the owner.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import traceback
from typing import Any

from mmrl_ray.child import receive, send
from mmrl_ray.errors import TrackerError, one_line, raised_at
from mmrl_ray.tracking.base import Tracker
from mmrl_ray.tracking.registry import make

_LONGEST_MESSAGE = 500
"""Characters of what an exception says."""


def work(owner: socket.socket) -> None:
    """Makes the tracker that comes first; then one call a request, one answer each."""
    setup = receive(owner)
    if setup is None:
        return
    name, about, options = pickle.loads(setup)  # noqa: S301 - from the process that started this one
    mine = os.getpid()
    tracker: Tracker | None = None
    try:
        tracker = make(name, about, options)
        answer: dict[str, Any] = {"rewinds": bool(tracker.rewinds)}
    except BaseException as error:  # noqa: BLE001 - the boundary to anybody's code
        answer = {"error": _told(error), "expected": isinstance(error, TrackerError)}
    send(owner, json.dumps(answer).encode())
    while tracker is not None and (request := receive(owner)) is not None:
        answer = _do(tracker, *pickle.loads(request))  # noqa: S301 - as above
        if os.getpid() != mine:
            os._exit(0)  # a library forked and came back twice
        send(owner, json.dumps(answer).encode())


def _do(tracker: Tracker, method: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """What the method gives, or the `error` that it raised; `about` is no method, and is replaced."""
    try:
        if method == "about":
            (tracker.about,) = arguments
            return {}
        value = getattr(tracker, method)(*arguments)
        json.dumps(value)
        return {"value": value}
    except BaseException as error:  # noqa: BLE001 - the boundary to anybody's code; time-outs of libraries are some
        return {"error": _told(error), "expected": isinstance(error, TrackerError)}


def _told(error: BaseException) -> str:
    if isinstance(error, TrackerError):
        return one_line(error)
    traceback.print_exception(error)
    message = one_line(error).encode(errors="backslashreplace").decode()
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[: _LONGEST_MESSAGE - 1]}…"
    return f"{type(error).__name__}: {message}{raised_at(error, without=lambda file: file == __file__)}"
