"""`mmrl` in a process of its own that need not import for seconds."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, TextIO

from tests.support.forks import forks


class Program:
    """`mmrl` with some arguments; what it has of `subprocess.Popen` works as there, its output and errors are one."""

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        *,
        log: BinaryIO | None = None,
        main: str = "tests.support.forks:mmrl",
    ) -> None:
        """Starts it in `folder`; what it says goes to `log`, if there is one, else to `stdout`."""
        read, write = os.pipe()
        self.stdout: TextIO = os.fdopen(read, encoding="utf-8")
        output = write if log is None else log.fileno()
        self._told: socket.socket = forks().fork(main, ["mmrl", *arguments], environment, str(folder), output)
        os.close(write)
        self.pid = int(_line(self._told))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("mmrl", timeout or 0.0)
            with self._told:
                self.returncode = int(_line(self._told))
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        found: list[str] = []
        reader = threading.Thread(target=lambda: found.append(self.stdout.read()), daemon=True)
        reader.start()
        reader.join(timeout)
        if reader.is_alive():
            raise subprocess.TimeoutExpired("mmrl", timeout or 0.0)
        self.wait(timeout)
        return found[0], None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _line(connection: socket.socket) -> bytes:
    found = b""
    while not found.endswith(b"\n"):
        byte = connection.recv(1)
        assert byte, "the server of forks is gone"
        found += byte
    return found
