"""Who writes a run folder: one process at a time, which says in `owner.json` that it lives.

    take ──▶ no owner.json, or a stale one ──▶ write it ──heartbeat──▶ … ──▶ delete it
         └─▶ its owner lives ──▶ RunError that names it

An owner on this machine is dead when its process is; any other when its heartbeat has stopped. On a local or network
file system the file is created atomically, and take-overs exclude each other by `flock` of the folder, where the
system has that (of two at once on NFS the first gives way at its next heartbeat). An
object store of `pyarrow.fs` has no conditional put: there two that start within a second of each other see it when
they read back what they wrote, which is as good as can be done, not a guarantee.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from mmrl_ray.errors import RunError
from mmrl_ray.processes import process_start
from mmrl_ray.run_records.run_dir import RunDir

OWNER_FILE = "owner.json"
HEARTBEAT_S = 10.0
STALE_S = 120.0
"""An owner that was not heard of for so long is dead, unless its process can be seen to live."""
_SETTLE_S = 1.0
"""After a put to an object store, before it is read back."""


class RunOwner:
    """The ownership of a run folder while inside.

    Raises (entering): `RunError` another process owns it, or the folder cannot be written.
    """

    def __init__(self, run: RunDir, *, heartbeat_s: float = HEARTBEAT_S, stale_s: float = STALE_S) -> None:
        self._run = run
        self._heartbeat_s, self._stale_s = heartbeat_s, stale_s
        self._mine = {
            "id": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": process_start(os.getpid()),
            "machine": _machine(),
            "since": time.time(),
        }
        self.taken_over: str | None = None
        """Of whom the folder was taken over; None where nobody had it."""
        self.lost: str | None = None
        """Who has taken the folder over from this process."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="owner", daemon=True)

    def __enter__(self) -> Self:
        with _guarded(self._run):
            there = _read(self._run)
            if there is not None:
                self._refuse_living(there)
                self.taken_over = told(there)
            self._write(is_new=there is None)
        if not self._run.is_local:
            time.sleep(_SETTLE_S)
            self._look()
            self.check()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(RunError):  # the next one finds a dead owner
            self._look()
            if self.lost is None:
                self._run.delete(OWNER_FILE)

    def check(self) -> None:
        """Passes while the folder is this process's.

        Raises:
            RunError: somebody else has it by now; nothing may be written there any more.
        """
        if self.lost is not None:
            raise RunError(
                f"{self._run.location} was taken over by {self.lost}, while this process was not heard of: it stops"
            )

    def _refuse_living(self, there: dict[str, Any]) -> None:
        if is_alive(there, stale_s=self._stale_s):
            raise RunError(in_use(self._run, there))
        if there.get("machine") != _machine():
            # Clocks of machines differ: a heartbeat that is being written is younger than it looks.
            time.sleep(min(1.5 * self._heartbeat_s, self._stale_s))
            now = _read(self._run)
            if now is not None and (now.get("id"), now.get("time")) != (there.get("id"), there.get("time")):
                raise RunError(in_use(self._run, now))

    def _write(self, *, is_new: bool) -> None:
        said = {**self._mine, "time": time.time()}
        if is_new and self._run.is_local:
            try:
                os.close(os.open(self._run.local_path(OWNER_FILE), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
            except FileExistsError:
                raise RunError(in_use(self._run, _read(self._run) or {})) from None
            except OSError as error:
                raise RunError(f"{self._run.full_path(OWNER_FILE)}: {error.strerror}") from error
        self._run.write_json(OWNER_FILE, said)

    def _look(self) -> None:
        """Whether the folder is still this process's."""
        there = _read(self._run)
        if there and there.get("id") != self._mine["id"]:  # one that is being written says nothing
            self.lost = told(there)

    def _beat(self) -> None:
        while not self._ended.wait(self._heartbeat_s) and self.lost is None:
            with contextlib.suppress(RunError):  # storage that fails for a while; whoever writes results says it
                self._look()
                if self.lost is None:
                    self._write(is_new=False)


def living_owner(run: RunDir) -> str | None:
    """Who is at work in a run folder, in words; None where nobody is known to be."""
    there = _read(run)
    return told(there) if there is not None and is_alive(there) else None


def is_alive(owner: dict[str, Any], *, stale_s: float = STALE_S) -> bool:
    """Whether the process that wrote an `owner.json` still lives, as far as can be seen from here."""
    if owner.get("machine") == _machine() and isinstance(owner.get("pid"), int):
        return process_start(owner["pid"]) == owner.get("started")
    heard = owner.get("time")
    return isinstance(heard, int | float) and time.time() - heard < stale_s


def in_use(run: RunDir, owner: dict[str, Any]) -> str:
    """Why a run folder cannot be had, and what to do."""
    return (
        f"{run.location} is being written by {told(owner)}: wait for it, or stop it first (Ctrl-C there, or mmrl jobs "
        f"stop); if that machine is gone, the folder is free {STALE_S:g} s after its last word"
    )


def told(owner: dict[str, Any]) -> str:
    """An owner in words."""
    since = owner.get("since")
    when = (
        f", since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(since))}" if isinstance(since, int | float) else ""
    )
    return f"process {owner.get('pid', '?')} on {owner.get('host', 'an unknown host')}{when}"


def _machine() -> str:
    """Names one boot of one machine and the process ids that are counted there (containers have their own)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _read(run: RunDir) -> dict[str, Any] | None:
    """What `owner.json` says; {} of one that is not whole, None where there is none."""
    if not run.exists(OWNER_FILE):
        return None
    try:
        found = run.read_json(OWNER_FILE)
    except RunError:
        return {} if run.exists(OWNER_FILE) else None
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def _guarded(run: RunDir) -> Iterator[None]:
    """One taker at a time, where the file system has locks. The kernel lets go of it, whatever becomes of the taker."""
    if not run.is_local:
        yield
        return
    try:
        descriptor = os.open(run.local_path(), os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise RunError(f"{run.location}: {error.strerror}; choose another run.root") from error
    try:
        with contextlib.suppress(OSError):  # no locks here: the creation of the file alone decides
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
