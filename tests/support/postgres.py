"""A PostgreSQL server of its own for a test session, where its binaries are installed."""

from __future__ import annotations

import contextlib
import glob
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

_START_S = 60


def postgres_binaries() -> Path | None:
    """The folder of `initdb` and `pg_ctl`; Debian keeps them off the PATH."""
    found = shutil.which("initdb")
    folders = [os.path.dirname(os.path.realpath(found))] if found else []
    folders += sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)
    return next((Path(each) for each in folders if os.access(Path(each) / "pg_ctl", os.X_OK)), None)


@contextlib.contextmanager
def postgres_server(binaries: Path) -> Iterator[str]:
    """SQLAlchemy URL of a fresh database on a loopback port; the server is gone afterwards.

    `initdb` refuses root, so under root it all runs as another user.
    """
    folder = Path(tempfile.mkdtemp(prefix="mmrl-pg-", dir="/tmp"))
    drop: list[str] = []
    if os.getuid() == 0:
        names = {each.pw_name for each in pwd.getpwall()}
        user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
        os.chown(folder, user.pw_uid, user.pw_gid)
        drop = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    data = folder / "data"
    try:
        _run([*drop, str(binaries / "initdb"), "-D", str(data), "-U", "mmrl", "-A", "trust", "--no-sync"], folder)
        port = _free_port()
        options = f"-h 127.0.0.1 -p {port} -k {folder} -c fsync=off -c shared_buffers=16MB"
        control = [*drop, str(binaries / "pg_ctl"), "-D", str(data), "-w", "-t", str(_START_S)]
        _run([*control, "-l", str(folder / "log"), "-o", options, "start"], folder)
        try:
            yield f"postgresql+psycopg://mmrl@127.0.0.1:{port}/postgres"
        finally:
            _run([*control, "-m", "immediate", "stop"], folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(
        command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=2 * _START_S, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout} {done.stderr}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
