"""HAProxy as Ray starts it, made fit for strangers: its config is mended before it is read, and it ends with its Ray.

    Ray writes haproxy.cfg ──▶ starts `haproxy` of our folder ──▶ sed ──▶ die.py ──exec──▶ the real one, all one process

Ray answers its own two paths without a key, says in plain text where nothing is served, turns whatever a lost replica
causes into a plain 500. There is no switch for any of them, but one for which program to start. Nor does it end HAProxy
where Ray itself is killed, so the kernel is asked to. What HAProxy cannot read, or not in time, it answers (400, 408)
with pages that are built into it; `errorfile` is for requests that it could read.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import psutil
from starlette.responses import JSONResponse, Response

from mmrl_ray.processes import process_start
from mmrl_ray.serving.auth import BROWSER_PATHS, LIVE, no_key
from mmrl_ray.serving.http_errors import HARMLESS_ID, closed, error_response, rate_limited, unavailable

_PREFIX = "mmrl-haproxy-"
_OWNER = "owner.json"
_FORGOTTEN_S = 86_400.0
"""A folder that does not say whose it is, and was not touched for so long, is nobody's."""
_END_S = 10.0
_LONGEST_PLACE = 60
_PROGRAM = """\
#!/bin/sh
# Starts HAProxy on the config that Ray has just written, after front.sed went over it.
parent=$PPID
previous=
for argument in "$@"; do
    [ "$previous" = -f ] && {{ sed -i -E -f {script} "$argument" || exit 1; }}
    previous=$argument
done
exec {python} -I -S {die} "$parent" {real} "$@"
"""
_DIE = """\
# Asks the kernel to end this process with its parent, and becomes another program.
import ctypes, os, signal, sys
try:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
except AttributeError:  # not on Linux
    pass
if os.getppid() != int(sys.argv[1]):
    sys.exit("the process that starts HAProxy has ended")
os.execv(sys.argv[2], sys.argv[2:])
"""
_SCRIPT = """\
s#^( *errorfile 50[23]) .*#\\1 {folder}/{unavailable}#
s#^( *errorfile 504) .*#\\1 {folder}/{timeout}#
s#^( *http-request return status) [0-9]* .* if (routes|healthcheck.*)$#\\1 401 errorfile {folder}/{closed} if \\2#
s#^( *http-request return status) 404 .*Ping http.*#\\1 503 errorfile {folder}/{unavailable}#
s#^ *acl (backend_.*_server_up) .*#&\\n    http-request return status 200 errorfile {folder}/{live} if live flood \\1#
/^frontend http_frontend/,/^ *bind /s#^ *bind .*#&\\n{fair}#
s#^frontend http_frontend#{keys}\\n&#
"""
_KEYS = """\
backend mmrl_keys
    stick-table type binary len 20 size 100k expire 1h"""
"""Digests of keys that have worked lately."""
_FAIR = """\
    stick-table type ipv6 size 100k expire 60s store conn_cur,gpc0_rate(10s)
    tcp-request connection track-sc0 src,ipmask(32,64)
    tcp-request connection reject if {{ sc_conn_cur(0) gt {connections} }}
    http-request set-var(txn.mmrl_id) uuid()
    http-request set-var(txn.mmrl_id) req.hdr(x-request-id) if {{ req.hdr(x-request-id) -m reg {id} }}
    http-after-response set-header x-request-id %[var(txn.mmrl_id)] if !{{ res.hdr(x-request-id) -m found }}
    acl live path {live_path}
    acl key req.hdr(authorization) -m found
    acl browser path {browser_paths}
    acl browser method OPTIONS
    acl browser req.hdr(origin) -m found
    acl flood sc0_gpc0_rate gt {strangers}
    http-request set-var(txn.mmrl_key) req.hdr(authorization),sha1 if key !live !{{ method OPTIONS }}
    acl known var(txn.mmrl_key),in_table(mmrl_keys)
    http-request sc-inc-gpc0(0) if !key
    http-request return status 429 errorfile {folder}/{flood} if flood !live !known
    http-request return status 401 errorfile {folder}/{keyless} if !key !live !browser
    http-response sc-inc-gpc0(0) if {{ var(txn.mmrl_key) -m found }} {{ status 401 429 }} !known
    http-response track-sc1 var(txn.mmrl_key) table mmrl_keys if {{ var(txn.mmrl_key) -m found }} {{ status lt 400 }}"""
"""Networks of IPv6 count as one address: whoever has one address of them has them all.

A request without a key is answered here, its body unread, but for liveness and for what browsers ask without one. An
address that sends many such, or keys that do not work, is refused here for some seconds. What clients behind one proxy
address can rely on: a key that has worked within the hour is never refused for its neighbours, and liveness is told
all the same, by HAProxy where need be. A key that is new there has to wait.
"""
_STRANGERS = 100
"""Requests without a key that works, of one address in ten seconds."""
_WAIT_S = 10.0


def write_front(folder: Path, real: str, *, connections: int) -> str:
    """Writes the program that stands in for `real`, an HAProxy, with its files; returns its path.

    An address may have `connections` open at a time.
    """
    answers = {
        "closed": closed(),
        "unavailable": unavailable(),
        "timeout": TimeoutError(),
        "keyless": no_key(),
        "flood": rate_limited("too many requests without a key that works came from this address", _WAIT_S),
    }
    files = {name: f"{name}.http" for name in (*answers, "live")}
    for name, error in answers.items():
        (folder / files[name]).write_bytes(_as_sent(error_response(error)))
    (folder / files["live"]).write_bytes(_as_sent(JSONResponse({"status": "live"})))
    fair = _FAIR.format(
        connections=connections,
        strangers=_STRANGERS,
        folder=folder,
        live_path=LIVE,
        id=HARMLESS_ID,
        browser_paths=" ".join(BROWSER_PATHS),
        **files,
    )
    script = _SCRIPT.format(folder=folder, fair=fair.replace("\n", "\\n"), keys=_KEYS.replace("\n", "\\n"), **files)
    (folder / "front.sed").write_text(script)
    (folder / "die.py").write_text(_DIE)
    program = folder / "haproxy"
    places = {"script": folder / "front.sed", "python": sys.executable, "die": folder / "die.py", "real": real}
    program.write_text(_PROGRAM.format(**{name: shlex.quote(str(place)) for name, place in places.items()}))
    program.chmod(0o755)
    return str(program)


def _as_sent(answer: Response) -> bytes:
    """A whole HTTP answer."""
    reason = HTTPStatus(answer.status_code).phrase
    head = [f"HTTP/1.1 {answer.status_code} {reason}", *(f"{k}: {v}" for k, v in answer.headers.items())]
    return "\r\n".join([*head, "", ""]).encode() + bytes(answer.body)


# -- folders, and what was left behind ---------------------------------------------------------------------------------


def own_folder() -> Path:
    """A temporary folder that is removed when this process ends, or, where it is killed, by `clear_leftovers`."""
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_place()))
    owner = os.getpid()
    (folder / _OWNER).write_text(json.dumps({"pid": owner, "started": process_start(owner)}))

    def remove() -> None:
        if os.getpid() == owner:  # not in a process that was forked off
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def clear_leftovers() -> None:
    """Ends HAProxies of this user's that have outlived their `mmrl serve`, and removes the folders of such."""
    for folder in _place().glob(f"{_PREFIX}*"):
        try:
            if folder.stat().st_uid != os.getuid() or not _is_left_behind(folder):
                continue
        except OSError:
            continue  # another start has removed it
        _, living = psutil.wait_procs(list(_killed(folder)), timeout=_END_S)
        if not living:
            shutil.rmtree(folder, ignore_errors=True)


def _place() -> Path:
    """Where temporary files are; the names of sockets there have some 100 characters at most."""
    place = tempfile.gettempdir()
    return Path(place if len(place) <= _LONGEST_PLACE else "/tmp")


def _is_left_behind(folder: Path) -> bool:
    try:
        owner = json.loads((folder / _OWNER).read_text())
        return process_start(int(owner["pid"])) != owner["started"]
    except (OSError, ValueError, KeyError, TypeError):  # just made, or half removed
        return time.time() - folder.stat().st_mtime > _FORGOTTEN_S and not list(_haproxies_of(folder))


def _killed(folder: Path) -> Iterator[psutil.Process]:
    for process in _haproxies_of(folder):
        with contextlib.suppress(psutil.Error):
            process.kill()
            yield process


def _haproxies_of(folder: Path) -> Iterator[psutil.Process]:
    """Processes whose config lies in that folder."""
    for process in psutil.process_iter(["cmdline"]):
        arguments = process.info["cmdline"] or []
        if any(a == "-f" and b.startswith(f"{folder}/") for a, b in itertools.pairwise(arguments)):
            yield process
