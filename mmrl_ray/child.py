"""The child's side of a process that can be ended: a watcher and its worker. `processes.py` is the owner's side.

    owner ── socket ──▶ worker: one answer a request
      └──── pipe ─────▶ watcher, its parent: kills the process group when the owner is gone

The watcher forks the worker before anything else is imported, and does nothing but wait, so that it can end a worker
that holds the interpreter; the kernel ends the worker if the watcher is killed.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import Any

_LENGTH = struct.Struct("!Q")
_LOOK_EVERY_S = 1.0
_PR_SET_PDEATHSIG = 1


def main(worker: str, requests: int, life: int, owner: int) -> None:
    """Runs worker (`module:function`) and watcher; `requests` and `life` are open files, `owner` holds their ends."""
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
            module, _, name = worker.partition(":")
            getattr(importlib.import_module(module), name)(connection)
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
            connection.shutdown(socket.SHUT_RDWR)  # processes that the worker forked may hold it open, too
        os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def send(to: socket.socket, content: bytes) -> None:
    """One frame; raises OSError where nobody reads, TimeoutError among them."""
    send_parts(to, len(content), (content,))


def send_parts(to: socket.socket, count: int, parts: Iterable[bytes]) -> None:
    """One frame of `count` bytes that are made as they go; raises like `send`."""
    to.sendall(_LENGTH.pack(count))
    for part in parts:
        to.sendall(part)


def receive(source: socket.socket) -> bytearray | None:
    """One frame; None where the other side has closed or is gone. Raises TimeoutError as the socket is set."""
    head = _read(source, _LENGTH.size)
    return None if head is None else _read(source, _LENGTH.unpack(head)[0])


def _read(source: socket.socket, count: int) -> bytearray | None:
    content = bytearray()
    while len(content) < count:
        try:
            piece = source.recv(min(count - len(content), 1 << 20))
        except ConnectionError:
            return None
        if not piece:
            return None
        content += piece
    return content
