"""The Ray of a run on this machine: its session folder, its processes' peak memory, and where its metrics are.

Session folders are marked while they are in use, and deleted when they have long been left. Each local Ray has a folder
of logs, sockets and spilled objects, and deletes none. Only those that bear the mark of this product are ever touched,
and they stay for a day after the last thing was written there: their logs say why a run ended. A Ray that lives writes
to its logs every few seconds. Millions of files take minutes to delete, so nobody waits.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import psutil
import ray

from mmrl_ray.processes import process_start
from mmrl_ray.run_records.run_dir import RunDir

logger = logging.getLogger(__name__)

MARK = "mmrl.json"
KEPT_S = 24 * 3600.0
"""From the last thing that was written into a session."""
_SHARE_OF_A_CORE = 0.02
"""What watching may cost."""
TARGETS = "prometheus.json"
"""In the form of Prometheus's file-based service discovery: `file_sd_configs: [{files: [runs/*/prometheus.json]}]`."""


def mark_session(folder: Path) -> None:
    """Marks the newest session that this process has begun in Ray's folder, where there is one."""
    sessions = sorted(folder.glob(f"session_*_{os.getpid()}"))
    if not sessions:
        return
    owner = {"pid": os.getpid(), "started": process_start(os.getpid()), "host": socket.gethostname()}
    try:
        (sessions[-1] / MARK).write_text(json.dumps(owner))
    except OSError as error:
        logger.warning("%s is not marked, and so will not be cleaned up: %s", sessions[-1], error)


def clean_in_background(folder: Path) -> None:
    """`clean_old_sessions` on a thread of its own; what it does not get to is the next one's."""
    threading.Thread(target=clean_old_sessions, args=(folder,), name="old-sessions", daemon=True).start()


def clean_old_sessions(folder: Path) -> list[Path]:
    """Deletes marked sessions that nobody has used for `KEPT_S`; returns which."""
    gone = []
    for session in sorted(folder.glob("session_*")):
        try:
            if _is_left(session):
                _delete(session)
                gone.append(session)
        except (OSError, ValueError, KeyError, TypeError) as error:  # no reason to end a run: it is only room
            logger.info("%s is not cleaned up: %s", session, error)
    return gone


def _delete(session: Path) -> None:
    """The mark last: what was begun is recognised when it is taken up again."""
    for path in session.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARK:
            path.unlink()
    shutil.rmtree(session)


def _is_left(session: Path) -> bool:
    if session.is_symlink() or not (session / MARK).is_file():
        return False
    if time.time() - _last_written(session) < KEPT_S:
        return False
    owner = json.loads((session / MARK).read_text())
    return owner["host"] != socket.gethostname() or process_start(int(owner["pid"])) != owner["started"]


def _last_written(session: Path) -> float:
    """Unix seconds of the last change in the session, its sockets and logs."""
    looked_at = [session, *session.iterdir()]
    logs = session / "logs"
    if logs.is_dir():
        looked_at += logs.iterdir()
    return max(path.lstat().st_mtime for path in looked_at)


class PeakMemory:
    """Samples the resident memory of this process and all its descendants on a thread.

    A local Ray's processes descend from the driver, so this covers them. Pages that processes share (the object store,
    libraries) count once where the kernel tells (PSS, Linux), else once a process (RSS). The kernel walks every page
    for that, on cores that learners and workers want: it is asked less often the longer it takes.
    """

    def __init__(self, interval_s: float = 1.0) -> None:
        self.peak_bytes = 0
        self._interval = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def _watch(self) -> None:
        while True:
            began = time.thread_time()
            self.peak_bytes = max(self.peak_bytes, resident_bytes())
            spent = time.thread_time() - began
            if self._stop.wait(max(self._interval, spent / _SHARE_OF_A_CORE)):
                return


def resident_bytes() -> int:
    """Bytes resident now in this process and all its descendants."""
    me = psutil.Process()
    return sum(_process_bytes(process) for process in (me, *me.children(recursive=True)))


def _process_bytes(process: psutil.Process) -> int:
    try:
        try:
            info = process.memory_full_info()
            return int(getattr(info, "pss", info.rss))
        except psutil.AccessDenied:
            return int(process.memory_info().rss)
    except psutil.Error:  # it ended while we looked
        return 0


@contextmanager
def scrape_targets(run: RunDir) -> Iterator[None]:
    """Says where Prometheus finds the metrics of Ray's nodes, while the block lasts.

    Nodes that come later are in Ray's own list, which the head of a cluster keeps.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    targets = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in nodes]
    run.write_json(TARGETS, [{"targets": targets, "labels": {"job": "mmrl_ray"}}])
    try:
        yield
    finally:
        run.delete(TARGETS)
