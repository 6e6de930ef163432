"""What Ray writes into HAProxy's config that clients must not see, mended before HAProxy reads it.

    Ray writes haproxy.cfg ──▶ starts `haproxy` of our folder ──▶ sed ──▶ exec of the real one, in the same process

Ray answers its own two paths without a key, says in plain text where nothing is served, and turns whatever a lost
replica causes into a plain 500. There is no switch for any of them, but one for which program to start.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from mmrl_ray.serving.http_errors import closed, error_response, unavailable

_CLOSED, _UNAVAILABLE, _TIMEOUT = "closed.http", "unavailable.http", "timeout.http"
_PROGRAM = """\
#!/bin/sh
# Starts HAProxy on the config that Ray has just written, after front.sed went over it.
previous=
for argument in "$@"; do
    [ "$previous" = -f ] && {{ sed -i -E -f {script} "$argument" || exit 1; }}
    previous=$argument
done
exec {real} "$@"
"""
_SCRIPT = """\
s#^( *errorfile 50[23]) .*#\\1 {folder}/{unavailable}#
s#^( *errorfile 504) .*#\\1 {folder}/{timeout}#
s#^( *http-request return status) [0-9]* .* if (routes|healthcheck.*)$#\\1 401 errorfile {folder}/{closed} if \\2#
s#^( *http-request return status) 404 .*Ping http.*#\\1 503 errorfile {folder}/{unavailable}#
"""


def write_front(folder: Path, real: str) -> str:
    """Writes the program that stands in for `real`, an HAProxy, with its files; returns its path."""
    for name, error in ((_CLOSED, closed()), (_UNAVAILABLE, unavailable()), (_TIMEOUT, TimeoutError())):
        (folder / name).write_bytes(_as_sent(error))
    script = _SCRIPT.format(folder=folder, closed=_CLOSED, unavailable=_UNAVAILABLE, timeout=_TIMEOUT)
    (folder / "front.sed").write_text(script)
    program = folder / "haproxy"
    program.write_text(_PROGRAM.format(script=shlex.quote(str(folder / "front.sed")), real=shlex.quote(real)))
    program.chmod(0o755)
    return str(program)


def _as_sent(error: Exception) -> bytes:
    """A whole HTTP answer."""
    answer = error_response(error)
    reason = {401: "Unauthorized", 503: "Service Unavailable", 504: "Gateway Timeout"}[answer.status_code]
    head = [f"HTTP/1.1 {answer.status_code} {reason}", *(f"{k}: {v}" for k, v in answer.headers.items())]
    return "\r\n".join([*head, "", ""]).encode() + bytes(answer.body)
