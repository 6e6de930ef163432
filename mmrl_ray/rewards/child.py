"""What runs in the process of a user's function, see `isolated.py`.

Nothing of the user's is imported before the process has its watcher. Requests are pickled by the owner; answers are
JSON, so that nothing that a function made is ever unpickled by the owner.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import numbers
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from mmrl_ray.child.main import receive, send
from mmrl_ray.errors import ConfigError, RewardError

_LONGEST_MESSAGE = 160
"""Characters of what a function's exception says."""


def work(owner: socket.socket) -> None:
    """Imports the function that comes first, then gives one answer a request."""
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
