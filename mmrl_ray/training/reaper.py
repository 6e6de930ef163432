"""Ends all processes of a local Ray when its driver is gone, however that ended.

    driver ── pipe ──▶ reaper, in a session of its own
                          └─ at the pipe's end, or when it has another parent: SIGKILL of all that bear the mark

The kernel ends Ray's raylet and GCS with the driver, and workers go when they miss the raylet. But Ray's two agents
look for their raylet only now and then, and wait a minute for the GCS to come back, and an actor that is busy writes on
into a run folder that somebody else has by then. What Ray starts, and all that this starts in turn, inherits a variable
of the environment that nothing else has. A process keeps it until it ends, since it is told by a second variable not to
write its title over its environment, as Ray's processes do otherwise.

The driver runs this file by itself: nothing here but the standard library.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_MARK = "MMRL_RAY_"
"""Begins the variable's name, whose rest is this Ray's own: of a Ray within another's job both are inherited."""
_KEEP_ENVIRONMENT = "SPT_NOENV"
"""Heeded by setproctitle, also by the copy of it that Ray has: titles take the place of the arguments alone."""
_LOOK_S = 1.0
GRACE_S = 2.0
"""What has not ended by itself so long after the driver is killed."""
_END_S = 10.0
"""A process that the kernel cannot end by then waits for a device, and is left to it."""
_STEP_S = 0.1
_OVER = b"."
"""What the driver says at the end of the block; the pipe of one that dies ends without."""


@contextmanager
def reaped() -> Iterator[None]:
    """Whatever is started meanwhile, and lives `GRACE_S` after this process has ended, is killed.

    At the end of the block so are those whose parents are gone; what is below this process is its own affair. Needs
    Linux's `/proc`; elsewhere it does nothing.
    """
    if not Path("/proc/self/environ").exists():
        yield
        return
    mark = f"{_MARK}{uuid.uuid4().hex}"
    command = [sys.executable, "-I", "-S", __file__, mark, str(os.getpid())]
    # It inherits them blocked: a service manager may signal every process of the service.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        reaper = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    added = [mark, *([] if _KEEP_ENVIRONMENT in os.environ else [_KEEP_ENVIRONMENT])]
    os.environ.update(dict.fromkeys(added, "1"))
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
        assert reaper.stdin is not None
        with suppress(BrokenPipeError), reaper.stdin:  # it is gone where somebody has killed it
            reaper.stdin.write(_OVER)
        threading.Thread(target=reaper.wait, name="reaper", daemon=True).start()  # else it stays as a zombie


def marked(mark: str) -> list[int]:
    """Processes that were started with this variable, as far as this user may see; not this one."""
    variable = f"{mark}=1".encode()
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            # It has ended meanwhile, or is another user's.
            with suppress(OSError), open(f"/proc/{entry.name}/environ", "rb") as file:
                if variable in file.read().split(b"\0"):
                    found.append(int(entry.name))
    return found


def _is_below(pid: int, ancestor: int) -> bool:
    while pid > 1 and pid != ancestor:
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                pid = int(file.read().rpartition(b")")[2].split()[1])
        except OSError:
            return False
    return pid == ancestor


def _reap(mark: str, driver: int) -> None:
    ended = time.monotonic()
    while there := [pid for pid in marked(mark) if os.getppid() != driver or not _is_below(pid, driver)]:
        since = time.monotonic() - ended
        if since >= GRACE_S + _END_S:
            return
        for pid in there if since >= GRACE_S else ():
            with suppress(OSError):  # it has ended by itself
                os.kill(pid, signal.SIGKILL)
        time.sleep(_STEP_S)


def _main(mark: str, driver: int) -> None:
    # A process that the driver has forked may hold the pipe open when the driver is gone.
    told = False
    while os.getppid() == driver and not told:
        told = bool(select.select([0], [], [], _LOOK_S)[0])
    if told and os.read(0, 1) != _OVER:  # the kernel closes its files first, and gives its children away last
        deadline = time.monotonic() + _END_S
        while os.getppid() == driver and time.monotonic() < deadline:
            time.sleep(_STEP_S)
    _reap(mark, driver)


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
