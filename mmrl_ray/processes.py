"""Other processes of this machine: when one started, and which one listens on a port."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import psutil


def process_start(pid: int) -> str | None:
    """When a process of this machine started, in ticks since boot; None if there is none. Pids are used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def listener(port: int) -> str | None:
    """Which process listens on a TCP port, in words; None where there is none, or another user's that is not told."""
    with contextlib.suppress(psutil.Error):
        for each in psutil.net_connections("tcp"):
            if each.status == psutil.CONN_LISTEN and each.laddr.port == port and each.pid is not None:
                process = psutil.Process(each.pid)
                name = " ".join(process.cmdline()[:3])[:80] or process.name()
                return f"process {process.pid} on {socket.gethostname()}: {name}"
    return None
