"""Processes of this machine: a child for work that may have to be ended, what is known of others, and leaving this one.

Such work is a function of a user's, a picture of a stranger's. A thread cannot be ended, and one that holds the
interpreter (a regular expression, a loop in C) holds everything else too. A process can: it is started once (70 ms and
its import), and reused; a request costs a round trip of some 0.15 ms. One that ran past its deadline is killed. It
begins as a fresh interpreter, so that it may use CUDA, writes to the same standard output and error, and never outlives
its owner, see `child.py`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

from mmrl_ray.child import Shared, receive, receive_shared, send
from mmrl_ray.errors import ProcessError

Answer = TypeVar("Answer")
_END_TIMEOUT_S = 5.0
_GIVEN_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
GROWING_SEGMENTS = "expandable_segments:True"
"""PyTorch's allocator on a GPU then grows what it has, and gives its end back: micro-batches are ragged, and freed
blocks of one shape would lie about in the way of the next."""
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""PyTorch from 2.10 on prefers the first; up to 2.9 it heeds the second alone, and so do libraries that look."""
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from mmrl_ray.child import main; main(sys.argv[2], *map(int, sys.argv[3:]))"
)
_FOREIGN_BOOT = (
    "import sys, types; sys.path.remove(''); here = types.ModuleType('mmrl_ray'); here.__path__ = [sys.argv[1]]; "
    "sys.modules['mmrl_ray'] = here; "
    "from mmrl_ray.child import main; main(sys.argv[2], *map(int, sys.argv[3:]))"
)
"""With another interpreter: of this project it finds the files that it imports, and of our packages none."""


def allocator_settings() -> dict[str, str]:
    """Environment variables for processes that use a GPU; none where the user has set one of PyTorch's himself."""
    if any(os.environ.get(name) for name in (*_ALLOCATOR, "PYTORCH_HIP_ALLOC_CONF")):
        return {}
    return dict.fromkeys(_ALLOCATOR, GROWING_SEGMENTS)


def without_growing_segments() -> dict[str, str]:
    """Environment variables for a process whose libraries share or move a GPU's memory themselves: what is set here,
    without such segments, which can be neither.
    """
    found = {name: os.environ[name] for name in (*_ALLOCATOR, "PYTORCH_HIP_ALLOC_CONF") if name in os.environ}
    return {
        name: ",".join(part for part in value.split(",") if not part.strip().startswith("expandable_segments"))
        for name, value in found.items()
    }


@dataclass(frozen=True, slots=True)
class Lost:
    """The process gave no answer, and is no more."""

    reason: str
    hung: bool = False
    """Ended at its deadline; otherwise it ended by itself, or was ended by another thread."""
    by: signal.Signals | None = None
    """What it ended of, if it was one."""


class ChildProcess:
    """One process, from its start to its end."""

    def __init__(
        self,
        worker: str,
        name: str,
        environment: Mapping[str, str] | None = None,
        *,
        python: str | None = None,
        output: int | None = None,
    ) -> None:
        """Starts it; returns before it has imported its worker.

        Args:
            worker: `module:function` of this project, called with the child's end of the socket.
            name: what errors call it.
            environment: variables that it has beside this process's own.
            python: another interpreter, with packages of its own; the worker may import what that one has.
            output: an open file that takes the place of standard output and error.

        Raises:
            ProcessError: it cannot be started.
        """
        self._name = name
        try:
            self._socket, theirs = socket.socketpair()
            watched, life = os.pipe()
        except OSError as error:  # too many files open
            raise ProcessError(f"{name}: no process can be started for it ({error})") from error
        arguments = [worker, str(theirs.fileno()), str(watched), str(os.getpid())]
        command = (
            [sys.executable, "-u", "-c", _BOOT, json.dumps(sys.path)]
            if python is None
            else [python, "-u", "-s", "-c", _FOREIGN_BOOT, str(Path(__file__).parent)]
        )
        try:
            self._popen = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(theirs.fileno(), watched),
                env={**os.environ, **(environment or {}), **({} if python is None else {"PYTHONPATH": ""})},
                start_new_session=True,  # a group to kill at once; and Ctrl-C is for the owner
            )
        except OSError as error:
            os.close(life)
            self._socket.close()
            raise ProcessError(f"{name}: no process can be started for it ({error})") from error
        finally:
            theirs.close()
            os.close(watched)
        # Also when this is collected, and when the interpreter ends; not in a process that was forked off.
        self.end = weakref.finalize(self, _end, self._popen, self._socket, life, os.getpid())

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self.end.alive and self._popen.poll() is None

    def ask(self, *request: bytes | Shared, timeout_s: float) -> bytearray | Lost:
        """One frame back for the frames of a request; where there is none, the process has ended.

        Another thread may `kill` it meanwhile.
        """
        return self._answer(receive, timeout_s, request)

    def more(self, timeout_s: float) -> Shared | Lost:
        """A further frame of the same answer, which is shared."""
        return self._answer(receive_shared, timeout_s, ())

    def kill(self) -> None:
        """Lets an `ask` of another thread come back `Lost`."""
        if self.end.alive:
            _kill(self._popen)

    def _answer(
        self,
        take: Callable[[socket.socket], Answer | None],
        timeout_s: float,
        request: tuple[bytes | Shared, ...],
    ) -> Answer | Lost:
        deadline = time.monotonic() + timeout_s
        answer: Answer | None = None
        try:
            for frame in request:
                self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
                send(self._socket, frame)
            self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            answer = take(self._socket)
        except TimeoutError:
            self.end()
            return Lost(f"{self._name} gave no answer within {timeout_s:.3g} s", hung=True)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.EINVAL):  # what it gave cannot be used
                self.end()
                return Lost(f"the answer of {self._name} is lost: {error.strerror}")
            # Otherwise it ended while it was being written to.
        if answer is None:
            try:
                code = self._popen.wait(_END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                code = 0
            self.end()
            by = _signal(code)
            how = f"exit status {code}" if by is None else by.name
            return Lost(f"the process of {self._name} ended by itself ({how})", by=by)
        return answer


class ProcessPool:
    """As many processes of one kind as are at work at a time, started when they are needed; from any threads."""

    def __init__(
        self,
        worker: str,
        name: str,
        most: int,
        *,
        environment: Mapping[str, str] | None = None,
        begin: Callable[[ChildProcess], None] = lambda process: None,
    ) -> None:
        """Args as `ChildProcess`'; `begin` is called with each new one first, and what it raises ends that one."""
        self._worker, self._name, self._environment, self._begin = worker, name, environment, begin
        self._turns = threading.BoundedSemaphore(most)
        self._lock = threading.Lock()
        self._idle: list[ChildProcess] = []

    @contextmanager
    def process(self, wait_s: float) -> Iterator[ChildProcess]:
        """One of them, nobody else's meanwhile; it is used again if it is alive then.

        Raises:
            ProcessError: none was free within `wait_s`, or none can be started.
        """
        if not self._turns.acquire(timeout=wait_s):
            raise ProcessError(f"{self._name}: others kept all processes busy for {wait_s:g} s")
        try:
            with self._lock:
                process = self._idle.pop() if self._idle else None
            if process is None or not process.alive:
                process = ChildProcess(self._worker, self._name, self._environment)
                try:
                    self._begin(process)
                except BaseException:
                    process.end()
                    raise
            try:
                yield process
            finally:
                if process.alive:
                    with self._lock:
                        self._idle.append(process)
        finally:
            self._turns.release()

    def close(self) -> None:
        """Ends the processes that are idle; others are started if it is used again."""
        with self._lock:
            idle, self._idle = self._idle, []
        for process in idle:
            process.end()


def _signal(code: int) -> signal.Signals | None:
    try:
        return signal.Signals(-code if code < 0 else code - 128)
    except ValueError:
        return None


def _end(popen: subprocess.Popen[bytes], connection: socket.socket, life: int, owner: int) -> None:
    if os.getpid() != owner:
        return
    _kill(popen)
    connection.close()
    os.close(life)
    with suppress(subprocess.TimeoutExpired):  # in the kernel's hands: killed, and stuck in a device
        popen.wait(_END_TIMEOUT_S)


def _kill(popen: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):  # it is gone
        os.killpg(popen.pid, signal.SIGKILL)


def process_start(pid: int) -> str | None:
    """When a process of this machine started, in ticks since boot; None if there is none. Pids are used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def listener(port: int) -> str | None:
    """Which process listens on a TCP port, in words; None where there is none, or another user's that is not told."""
    import psutil  # takes a while, and every command imports this file

    with suppress(psutil.Error):  # a process that has ended meanwhile, or is another user's
        for each in psutil.net_connections("tcp"):
            if each.status == psutil.CONN_LISTEN and each.laddr.port == port and each.pid is not None:
                process = psutil.Process(each.pid)
                name = " ".join(process.cmdline()[:3])[:80] or process.name()
                return f"process {process.pid} on {socket.gethostname()}: {name}"
    return None


def free_port() -> int:
    """A port that nobody has, and that the system gives to nobody who asks for any.

    One of those that it gives could be another process's connection by the time a server has started, which takes
    seconds. They begin at 32,768, unless Linux is told otherwise; Ray Serve's replicas take those from 30,000.
    """
    first, end = 20_000, 30_000
    with suppress(OSError, ValueError):
        end = min(end, int(_GIVEN_PORTS.read_text().split()[0]))
    for _ in range(100 if end > first else 0):
        port = first + secrets.randbelow(end - first)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    with socket.socket() as probe:  # the next best
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def leave(code: int) -> NoReturn:
    """Ends this process without the interpreter taking itself apart.

    Threads of Ray's and gRPC's that still run by then crash now and then, and work that is whole would end with the
    code of a crash. Register it with `atexit` before anything else is: what is registered first is called last.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or nobody reads on
            stream.flush()
    os._exit(code)
