"""What runs in the process of a user's function, see `function.py`.

Nothing of the user's is imported before the process has its watcher. Requests are pickled by the owner; answers are
JSON, so that nothing that a function made is ever unpickled by the owner.

What the function prints goes to standard error, each line with the function's name before it (`MARK`), by which a run
finds it among what its workers log. So does the traceback of an exception, the first time that it comes from there.
"""

from __future__ import annotations

import importlib
import inspect
import io
import json
import math
import numbers
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from mmrl_ray.child import receive, send
from mmrl_ray.errors import ConfigError, RewardError, one_line, raised_at

MARK = "[reward "
"""Begins each line that a function prints."""
_LONGEST_MESSAGE = 160
"""Characters of what a function's exception says."""


def work(owner: socket.socket) -> None:
    """Imports the function that comes first, then gives one answer a request."""
    setup = receive(owner)
    if setup is None:
        return
    path, kwargs, folder = pickle.loads(setup)  # noqa: S301 - from the process that started this one
    os.dup2(2, 1)  # what a library in C prints is no answer of a command either
    sys.stdout = sys.stderr = _Marked(path)
    sys.path.insert(0, folder)
    try:
        function = load_function(path, kwargs)
    except ConfigError as error:
        if error.__cause__ is not None:
            _show(error.__cause__, set())
        send(owner, json.dumps({"error": str(error)}).encode())
        return
    mine = os.getpid()
    send(owner, b"{}")
    shown: set[tuple[str, str]] = set()
    while (request := receive(owner)) is not None:
        captions, states = pickle.loads(request)  # noqa: S301 - as above
        answer = _answer(function, path, captions, states, kwargs, shown)
        if os.getpid() != mine:
            os._exit(0)  # the function forked and came back twice: a second answer would be taken for the next call's
        send(owner, json.dumps(answer).encode())


class _Marked(io.TextIOBase):
    """Standard error, each line with a mark before it; whole lines, so that those of several processes do not mix."""

    def __init__(self, path: str) -> None:
        self._mark = f"{MARK}{path}] "
        self._line = ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        if lines:
            os.write(2, "".join(f"{self._mark}{line}\n" for line in lines).encode(errors="replace"))
        return len(text)

    def flush(self) -> None:
        """Nothing: a line that has no end yet is held."""

    def end_line(self) -> None:
        """Writes what has no end yet."""
        if self._line:
            self.write("\n")

    def fileno(self) -> int:
        return 2

    def writable(self) -> bool:
        return True


def _show(error: BaseException, shown: set[tuple[str, str]]) -> None:
    """The traceback from the user's own code on, unless one of that kind from that line was shown before."""
    trace = error.__traceback__
    while trace is not None and _is_import(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    last = traceback.extract_tb(trace)[-1:]
    key = (type(error).__name__, f"{last[0].filename}:{last[0].lineno}" if last else "")
    if key not in shown:
        shown.add(key)
        traceback.print_exception(type(error), error, trace)


def _answer(
    function: Callable[..., Any],
    path: str,
    captions: list[str],
    states: list[Any],
    kwargs: Mapping[str, Any],
    shown: set[tuple[str, str]],
) -> dict[str, Any]:
    try:
        return {"scores": checked_scores(path, function(captions, states, **kwargs), len(captions))}
    except RewardError as error:
        return {"error": str(error)}
    except BaseException as error:  # noqa: BLE001 - the boundary to anybody's code; time-outs of libraries are some
        _show(error, shown)
        return {"error": told(error)}
    finally:
        if isinstance(sys.stderr, _Marked):
            sys.stderr.end_line()


def load_function(path: str, kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """The function that `module:function` names; a ConfigError where captions, states and `kwargs` do not call it."""
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except BaseException as error:
        raise ConfigError(
            f"{path} cannot be imported ({told(error)}): it is looked for in reward.code, by default the working "
            f"directory, here {sys.path[0] or os.getcwd()}, and among what is installed"
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
    message = one_line(error).encode(errors="backslashreplace").decode()  # files cannot hold surrogates
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[: _LONGEST_MESSAGE - 1]}…"
    return f"{type(error).__name__}: {message}{raised_at(error, without=_is_import)}"


def _is_import(filename: str) -> bool:
    return filename in (__file__, importlib.__file__) or filename.startswith("<frozen importlib")
