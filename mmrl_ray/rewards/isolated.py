"""A function of the user's in a process of its own, where it can be ended whatever it does.

A thread cannot be ended, and one that holds the interpreter (a regular expression, a loop in C) holds everything else
too. A process can: one is started for each function, once (70 ms and its import), and reused; a batch costs a round
trip of some 0.15 ms, with the pickling of its states. A process that ran past its deadline is killed, and the next call
starts another one. It begins as a fresh interpreter, so a function may use CUDA, and keeps what it loaded at its import
from call to call. It writes to the owner's standard error, and never outlives its owner, see `child.py`.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmrl_ray
from mmrl_ray.errors import ConfigError, RewardError
from mmrl_ray.rewards.child import receive, send

START_TIMEOUT_S = 300.0
"""For a function's module to be imported, with whatever models it loads."""
SENT_CODE = "reward_code"
"""Beside the package, where a job brought both: the user's own modules."""
_END_TIMEOUT_S = 5.0
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from mmrl_ray.rewards.child import main; main(*map(int, sys.argv[2:]))"
)


@dataclass(frozen=True, slots=True)
class Lost:
    """The process gave no answer, and is no more."""

    reason: str
    hung: bool = False
    """Ended at its deadline; otherwise it ended by itself."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one call."""

    scores: list[float | str] | Lost
    """A number, or why there is none, for each caption."""
    seconds: float
    """From the call's turn, the process being there, to its end."""


class IsolatedFunction:
    """`module:function` of anybody's, called in its own process. Pickles as its path; one call at a time."""

    def __init__(self, path: str, kwargs: Mapping[str, Any], code: str | None = None) -> None:
        """`code` is the folder whose modules come before those that are installed; the working directory else."""
        self.path = path
        self._kwargs = dict(kwargs)
        self._code = code
        self._process: _Process | None = None
        self._turn = threading.Lock()

    def start(self) -> None:
        """Starts the process, unless it runs.

        Raises:
            ConfigError: the function cannot be imported, within `START_TIMEOUT_S`, or not be called with its arguments.
        """
        if self._process is None or not self._process.alive:
            self._process = _Process(self.path, self._kwargs, _folder(self._code))

    def call(self, captions: Sequence[str], states: Sequence[Any], timeout_s: float) -> Answer:
        """What the function returns within `timeout_s`.

        The time until it is this call's turn, and until the process is there, does not count.

        Raises:
            RewardError: the function raised, or returned something else than one value a caption; or other calls kept
                the process busy for longer than `START_TIMEOUT_S`.
            ConfigError: as `start`.
        """
        if not self._turn.acquire(timeout=START_TIMEOUT_S):
            raise RewardError(f"{self.path} was busy with other captions for {START_TIMEOUT_S:g} s")
        try:
            self.start()
            assert self._process is not None
            began = time.monotonic()
            found = self._process.ask(pickle.dumps((list(captions), list(states))), timeout_s)
            seconds = time.monotonic() - began
        finally:
            self._turn.release()
        if isinstance(found, Lost):
            return Answer(found, seconds)
        if "error" in found:
            raise RewardError(found["error"])
        return Answer(found["scores"], seconds)

    def close(self) -> None:
        """Ends the process; a later call starts another one."""
        if self._process is not None:
            self._process.end()
            self._process = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "kwargs": self._kwargs, "code": self._code}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(state["path"], state["kwargs"], state["code"])  # type: ignore[misc]


class _Process:
    """One process, from its start to its end."""

    def __init__(self, path: str, kwargs: Mapping[str, Any], folder: str) -> None:
        self._path = path
        self._socket, theirs = socket.socketpair()
        watched, life = os.pipe()
        arguments = [json.dumps(sys.path), str(theirs.fileno()), str(watched), str(os.getpid())]
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-u", "-c", _BOOT, *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), watched),
                start_new_session=True,  # a group to kill at once; and Ctrl-C is for the owner
            )
        except OSError as error:
            os.close(life)
            self._socket.close()
            raise RewardError(f"{path}: no process can be started for it ({error})") from error
        finally:
            theirs.close()
            os.close(watched)
        # Also when this is collected, and when the interpreter ends; not in a process that was forked off.
        self.end = weakref.finalize(self, _end, self._popen, self._socket, life, os.getpid())
        answer = self.ask(pickle.dumps((path, dict(kwargs), folder)), START_TIMEOUT_S)
        if isinstance(answer, Lost):
            raise ConfigError(f"{path} cannot be imported: {answer.reason}; a function's module loads within that time")
        if "error" in answer:
            self.end()
            raise ConfigError(answer["error"])

    @property
    def alive(self) -> bool:
        return self.end.alive and self._popen.poll() is None

    def ask(self, request: bytes, timeout_s: float) -> dict[str, Any] | Lost:
        deadline = time.monotonic() + timeout_s
        answer: bytes | None = None
        try:
            self._socket.settimeout(max(timeout_s, 1e-3))
            send(self._socket, request)
            self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            answer = receive(self._socket)
        except TimeoutError:
            self.end()
            return Lost(f"{self._path} gave no answer within {timeout_s:.3g} s", hung=True)
        except OSError:
            pass  # it ended while it was being written to
        if answer is None:
            try:
                code = self._popen.wait(_END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                code = 0
            self.end()
            return Lost(f"the process of {self._path} ended by itself ({_how(code)})")
        return json.loads(answer)


def _folder(code: str | None) -> str:
    """Where the user's modules are: what a job brought, else the folder itself; empty for the working directory."""
    sent = Path(mmrl_ray.__file__).parents[1] / SENT_CODE
    if sent.is_dir():
        return str(sent)
    return "" if code is None else str(Path(code).expanduser())


def _how(code: int) -> str:
    try:
        return signal.Signals(code - 128).name
    except ValueError:
        return f"exit status {code}"


def _end(popen: subprocess.Popen[bytes], connection: socket.socket, life: int, owner: int) -> None:
    if os.getpid() != owner:
        return
    with suppress(ProcessLookupError):  # it is gone
        os.killpg(popen.pid, signal.SIGKILL)
    connection.close()
    os.close(life)
    with suppress(subprocess.TimeoutExpired):  # in the kernel's hands: killed, and stuck in a device
        popen.wait(_END_TIMEOUT_S)
