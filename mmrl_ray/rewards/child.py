"""The process that a user's function runs in. `isolated.py` starts it, asks it and ends it.

    owner ── socket ──▶ worker: imports the function, then one answer a request
      └──── pipe ─────▶ watcher, its parent: kills the process group when the owner is gone

The watcher forks the worker before anything of the user's is imported, and does nothing but wait, so that it can end
a worker whose function holds the interpreter; the kernel ends the worker if the watcher is killed. Requests are pickled
by the owner; answers are JSON, so that nothing that a function made is ever unpickled by the owner.
"""

from __future__ import annotations

import ctypes
import importlib
import inspect
import json
import math
import numbers
import os
import pickle
import select
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from decimal import Decimal
from functools import partial
from typing import Any

from mmrl_ray.errors import ConfigError, RewardError

_LENGTH = struct.Struct("!Q")
_LOOK_EVERY_S = 1.0
_PR_SET_PDEATHSIG = 1
_LONGEST_MESSAGE = 160
"""Characters of what a function's exception says."""


def main(requests: int, life: int, owner: int) -> None:
    """Runs worker and watcher; `requests` and `life` are open files, `owner` is the process that holds their ends."""
    for inherited in (requests, life):
        os.set_inheritable(inherited, False)
    connection = socket.socket(fileno=requests)
    signal.signal(signal.SIGCHLD, partial(_end_with_worker, connection))
    watcher = os.getpid()
    if os.fork() == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(life)
        _die_with(watcher)
        with connection:
            _work(connection)
        os._exit(0)
    watched = select.poll()
    watched.register(life, select.POLLIN | select.POLLHUP)
    while not watched.poll(_LOOK_EVERY_S * 1000) and os.getppid() == owner:
        pass
    os.killpg(0, signal.SIGKILL)


def _end_with_worker(connection: socket.socket, *_: Any) -> None:
    worker, status = os.waitpid(-1, os.WNOHANG)
    if worker and not os.WIFSTOPPED(status) and not os.WIFCONTINUED(status):
        with suppress(OSError):  # the owner is gone
            connection.shutdown(socket.SHUT_RDWR)  # processes that the function forked may hold it open, too
        os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _work(owner: socket.socket) -> None:
    setup = receive(owner)
    if setup is None:
        return
    path, kwargs = pickle.loads(setup)  # noqa: S301 - from the process that started this one
    try:
        function = load_function(path, kwargs)
    except ConfigError as error:
        send(owner, json.dumps({"error": str(error)}).encode())
        return
    mine = os.getpid()
    send(owner, b"{}")
    while (request := receive(owner)) is not None:
        captions, states = pickle.loads(request)  # noqa: S301 - as above
        answer = _answer(function, path, captions, states, kwargs)
        if os.getpid() != mine:
            os._exit(0)  # the function forked and came back twice: a second answer would be taken for the next call's
        send(owner, json.dumps(answer).encode())


def _answer(
    function: Callable[..., Any], path: str, captions: list[str], states: list[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    try:
        return {"scores": checked_scores(path, function(captions, states, **kwargs), len(captions))}
    except RewardError as error:
        return {"error": str(error)}
    except BaseException as error:  # noqa: BLE001 - the boundary to anybody's code; time-outs of libraries are some
        return {"error": told(error)}


def load_function(path: str, kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """The function that `module:function` names, if it can be called with captions, states and `kwargs`.

    Raises:
        ConfigError: it cannot.
    """
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except BaseException as error:
        raise ConfigError(
            f"{path} cannot be imported ({told(error)}): install the module on every node, or name its folder in "
            "PYTHONPATH"
        ) from error
    if not callable(found):
        raise ConfigError(f"{path}: module {module} has no function {name!r}")
    try:
        inspect.signature(found).bind([], [], **kwargs)
    except TypeError as error:
        raise ConfigError(
            f"{path} cannot be called as {name}(captions, states, **{sorted(kwargs)}): {error}; fix its arguments or "
            "`kwargs`"
        ) from error
    except ValueError:
        pass  # a builtin that tells nothing of its arguments
    return found


def checked_scores(path: str, returned: Any, expected: int) -> list[float | str]:
    """One for each caption: a finite number, or why what was returned for it is none.

    Raises:
        RewardError: it is no list of so many.
    """
    found = returned.tolist() if hasattr(returned, "tolist") else returned  # an array of NumPy, a tensor
    if not isinstance(found, list | tuple):
        raise RewardError(f"{path} returned {type(returned).__name__}; return a list of one number a caption")
    if len(found) != expected:
        raise RewardError(f"{path} returned {len(found)} numbers for {expected} captions")
    numbers_found = [value.item() if getattr(value, "ndim", None) == 0 else value for value in found]  # their scalars
    return [
        float(value)
        if isinstance(value, numbers.Real | Decimal) and math.isfinite(value)
        else f"{path} returned {value!r:.80} for caption {place}, which is no finite number"
        for place, value in enumerate(numbers_found)
    ]


def told(error: BaseException) -> str:
    """Type, message, and file and line of the last call that the exception came through."""
    message = " ".join(str(error).split()).encode(errors="backslashreplace").decode()  # files cannot hold surrogates
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[: _LONGEST_MESSAGE - 1]}…"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_import(f.filename)]
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {message}{where}"


def _is_import(filename: str) -> bool:
    return filename in (__file__, importlib.__file__) or filename.startswith("<frozen importlib")


def send(to: socket.socket, content: bytes) -> None:
    """One frame; raises OSError where nobody reads, TimeoutError among them."""
    to.sendall(_LENGTH.pack(len(content)))
    to.sendall(content)


def receive(source: socket.socket) -> bytes | None:
    """One frame; None where the other side has closed or is gone. Raises TimeoutError as the socket is set."""
    head = _read(source, _LENGTH.size)
    return None if head is None else _read(source, _LENGTH.unpack(head)[0])


def _read(source: socket.socket, count: int) -> bytes | None:
    content = bytearray()
    while len(content) < count:
        try:
            piece = source.recv(min(count - len(content), 1 << 20))
        except ConnectionError:
            return None
        if not piece:
            return None
        content += piece
    return bytes(content)
