"""Ray's session folders of this product: marked while they are in use, and deleted when they have long been left.

Each local Ray has a folder of logs, sockets and spilled objects, and deletes none. Only those that bear the mark of
this product are ever touched, and they stay for a day after the last thing was written there: their logs say why a run
ended. A Ray that lives writes to its logs every few seconds. Millions of files take minutes to delete, so nobody waits.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import threading
import time
from pathlib import Path

from mmrl_ray.processes import process_start

logger = logging.getLogger(__name__)

MARK = "mmrl.json"
KEPT_S = 24 * 3600.0
"""From the last thing that was written into a session."""


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
