"""Processes that need not import for seconds, since they are forked from one that has: `mmrl`, and workers of a Ray.

    a test ──▶ Program ─────────────┐
    raylet ──▶ forked_worker.py ────┴─ socket ─▶ python -m tests.support.forks ──fork──▶ mmrl, ray::RolloutWorker, …

A fork differs from a fresh interpreter in what is imported already, and in nothing that is tested. Runs, servers and
jobs on a Ray of their own have workers as users have them, and programs that get signals are started as users do.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

VARIABLE = "MMRL_TEST_FORKS"
"""Where `forked_worker.py` finds the server's socket."""
# The program's own entry comes first: it sets what torch reads when it is loaded. Nothing of this imports Ray, which
# reads at its import, once, whose worker a process is.
_IMPORTED = """
mmrl_ray.cli mmrl_ray.policy.load mmrl_ray.policy.generation.local mmrl_ray.learner.step mmrl_ray.learner.checkpoints
mmrl_ray.rewards.build mmrl_ray.report.page pandas aiohttp fastapi sqlalchemy
transformers.models.llava.modeling_llava transformers.models.llava.processing_llava
transformers.models.clip.modeling_clip transformers.models.llama.modeling_llama
"""
_READ = 1 << 20
_WORKER = Path(__file__).with_name("forked_worker.py")


class Forks:
    """The server of this process, which ends with it."""

    def __init__(self) -> None:
        self.path = str(Path(tempfile.mkdtemp(prefix="mmrl-forks-")) / "socket")
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", __name__, self.path, str(theirs.fileno())]
            path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
            self._server = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], env={**os.environ, "PYTHONPATH": path}, start_new_session=True
            )
        self._life = ours
        assert ours.recv(1) == b"!", "the server of forks did not start"
        atexit.register(self.close)

    def close(self) -> None:
        """Whoever it has forked goes on."""
        self._life.close()
        shutil.rmtree(Path(self.path).parent, ignore_errors=True)

    def fork(
        self, main: str, arguments: Sequence[str], environment: Mapping[str, str], folder: str, output: int
    ) -> socket.socket:
        """A socket on which come the pid of the new process, a line, and its exit code, another."""
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.path)
        ask(connection, main, arguments, environment, folder, (output, output))
        return connection


@functools.cache
def forks() -> Forks:
    """The one of this process."""
    return Forks()


@contextmanager
def forked_workers() -> Iterator[None]:
    """A node of a Ray that is started meanwhile has workers that are forked, too."""
    from ray._private import parameter  # the server imports this file, and no Ray

    os.environ[VARIABLE] = forks().path
    made = parameter.RayParams
    parameter.RayParams = functools.partial(made, setup_worker_path=str(_WORKER))  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        parameter.RayParams = made  # type: ignore[misc]


def ask(
    connection: socket.socket,
    main: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    folder: str,
    outputs: tuple[int, int],
) -> None:
    """`main` is `module:function`, which is called with no arguments and finds these in `sys.argv`."""
    request = json.dumps([main, [*arguments], dict(environment), folder]).encode()
    socket.send_fds(connection, [len(request).to_bytes(4)], outputs)
    connection.sendall(request)


def serve(path: str, life: int) -> None:
    """Until the other end of `life` is closed."""
    for name in _IMPORTED.split():
        importlib.import_module(name)
    assert "ray" not in sys.modules
    woken, wakes = socket.socketpair()
    wakes.setblocking(False)
    signal.set_wakeup_fd(wakes.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, socket.socket] = {}
    with socket.socket(fileno=life) as alive, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        alive.sendall(b"!")
        looks = selectors.DefaultSelector()
        for each in (alive, listener, woken):
            looks.register(each, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in looks.select()}
            if alive in ready:
                return
            if woken in ready:
                woken.recv(4096)
                _reap(running)
            if listener in ready:
                connection, _ = listener.accept()
                request, outputs = _received(connection)
                if request is None:
                    connection.close()
                    continue
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for each in (looks, alive, listener, woken, wakes, connection, *running.values()):
                        each.close()
                    _become(*json.loads(request), outputs)
                for output in outputs:
                    os.close(output)
                running[pid] = connection
                with suppress(OSError):
                    connection.sendall(b"%d\n" % pid)


def _received(connection: socket.socket) -> tuple[bytes | None, list[int]]:
    """No request where whoever asks was killed meanwhile."""
    outputs: list[int] = []
    with suppress(OSError):
        size, outputs, _, _ = socket.recv_fds(connection, 4, 2)
        request = b""
        while len(outputs) == 2 and (more := connection.recv(_READ)):
            request += more
            if len(request) == int.from_bytes(size):
                return request, outputs
    for output in outputs:
        os.close(output)
    return None, []


def _reap(running: dict[int, socket.socket]) -> None:
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            with running.pop(found[0]) as connection, suppress(OSError):
                connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(found[1]))


def _become(main: str, arguments: list[str], environment: dict[str, str], folder: str, outputs: list[int]) -> None:
    for standard, output in zip((1, 2), outputs, strict=True):
        os.dup2(output, standard)
        os.close(output)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[0] = folder
    sys.argv = arguments
    module, _, function = main.partition(":")
    code = 1
    try:
        getattr(importlib.import_module(module), function)()
        code = 0
    except SystemExit as asked:
        code = asked.code if isinstance(asked.code, int) else int(asked.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter does
        sys.excepthook(*sys.exc_info())
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def mmrl() -> None:
    """The program."""
    from mmrl_ray.cli import app

    app()


def worker() -> None:
    """A worker of a Ray: what raylet would start, in this process."""
    os.setpgid(0, 0)  # raylet kills the group of a worker that has ended
    np.random.seed()  # as a fresh process has it
    script = sys.argv[0]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
