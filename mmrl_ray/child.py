"""The child's side of a process that can be ended: a watcher and its worker. `processes.py` is the owner's side.

    owner ── socket ──▶ worker: one answer a request
      └──── pipe ─────▶ watcher, its parent: kills the process group when the owner is gone

The watcher forks the worker before anything else is imported, and does nothing but wait, so that it can end a worker
that holds the interpreter; the kernel ends the worker if the watcher is killed.

Large answers (`Shared`) are memory that both sides map, and not a byte of it goes through the socket. It is no file of
/dev/shm, which containers keep small: the kernel frees it with the last process that has it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import importlib
import mmap
import os
import select
import signal
import socket
import struct
import sys
import tempfile
import weakref
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import Any

_LENGTH = struct.Struct("!Q")
_LOOK_EVERY_S = 1.0
_PR_SET_PDEATHSIG = 1
_SEALABLE = hasattr(os, "memfd_create")
"""Linux; elsewhere an unlinked file takes its place."""


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


class Shared:
    """Bytes that do not change any more, for whoever has this or was sent it; freed with the last of them."""

    def __init__(self, descriptor: int, count: int) -> None:
        """Takes over an open file of `count` bytes."""
        self.count = count
        self.descriptor = descriptor
        self.close = weakref.finalize(self, os.close, descriptor)

    @classmethod
    def of(cls, parts: Iterable[bytes | memoryview]) -> Shared:
        """Made of these, one behind the other; an OSError where there is no memory for them."""
        if _SEALABLE:
            made = cls(os.memfd_create("mmrl", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), 0)
        else:
            with tempfile.TemporaryFile() as file:
                made = cls(os.dup(file.fileno()), 0)
        for part in parts:
            left = memoryview(part).cast("B")
            while left:
                left = left[os.write(made.descriptor, left) :]
            made.count += memoryview(part).nbytes
        if _SEALABLE:
            # One that got shorter would be the death of whoever looks behind its end.
            every = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(made.descriptor, fcntl.F_ADD_SEALS, every)
        return made

    def map(self) -> mmap.mmap:
        """Its bytes, without a copy; they outlive this, keep the file open, and what is written to them nobody else
        sees."""
        return mmap.mmap(self.descriptor, self.count, access=mmap.ACCESS_COPY)


def send(to: socket.socket, content: bytes | Shared) -> None:
    """One frame; raises OSError where nobody reads, TimeoutError among them."""
    if isinstance(content, Shared):
        to.sendall(_LENGTH.pack(content.count))
        socket.send_fds(to, [b"\0"], [content.descriptor])
    else:
        to.sendall(_LENGTH.pack(len(content)))
        to.sendall(content)


def receive(source: socket.socket) -> bytearray | None:
    """One frame; None where the other side has closed or is gone. Raises TimeoutError as the socket is set."""
    head = _read(source, _LENGTH.size)
    return None if head is None else _read(source, _LENGTH.unpack(head)[0])


def receive_shared(source: socket.socket) -> Shared | None:
    """A frame that is `Shared`; returns and raises like `receive`, and an OSError where it cannot be used."""
    head = _read(source, _LENGTH.size)
    if head is None:
        return None
    _, descriptors, _, _ = socket.recv_fds(source, 1, 1)
    if not descriptors:
        raise OSError(errno.EMFILE, "no memory came along: this process has too many files open")
    found = Shared(descriptors[0], _LENGTH.unpack(head)[0])
    sealed = not _SEALABLE or fcntl.fcntl(found.descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    if not sealed or os.fstat(found.descriptor).st_size < found.count:
        raise OSError(errno.EINVAL, "the memory that came along is shorter than it is said to be, or may become so")
    return found


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
