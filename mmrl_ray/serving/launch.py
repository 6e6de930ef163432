"""Serve on a Ray that is up: start it, put applications on it, wait for them, take them away again."""

from __future__ import annotations

import logging
import socket
import threading
import time

import ray
from ray import serve
from ray.experimental import internal_kv
from ray.serve import Application
from ray.serve.api import RunTarget
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, DeploymentStatus

from mmrl_ray.errors import PlacementError, ServingError

_CONTROLLER = ("SERVE_CONTROLLER_ACTOR", "serve")
"""Name and namespace of the one actor that every Serve has."""
_MARK = b"mmrl-serve"
"""Key in Ray's own store: the id of the controller of a Serve that this product has started."""
_POLL_S = 0.1
_FAILED = (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY)
_LONGEST_REASON = 500
"""Characters."""


def start_serve(*, host: str | None = None, port: int = 8000) -> bool:
    """Starts Serve, with an HTTP front end where a host is given; False when it was running before.

    It is marked as this product's, to be ended by whoever takes the last application from it (`stop_serve`).

    Raises:
        ServingError: it does not come up.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # its progress is not the program's
    if serve_is_running():
        return False
    try:
        if host is None:
            serve.start(proxy_location="Disabled")
        else:
            serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
    except (RuntimeError, TimeoutError) as error:
        taken = "another program listens there; choose another port"
        reason = taken if _listens(host, port) else _last_line(str(error))
        raise ServingError(f"Ray Serve does not start on {host}:{port}: {reason}") from error
    internal_kv._internal_kv_put(_MARK, _controller_id(), namespace=_MARK)
    return True


def _listens(host: str | None, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1.0).close()
    except OSError:
        return False
    return True


def serve_is_running() -> bool:
    """Whether this Ray has a Serve already."""
    try:
        ray.get_actor(*_CONTROLLER)
    except ValueError:
        return False
    return True


def deploy(application: Application, name: str, *, route_prefix: str | None) -> None:
    """Hands an application to Serve and returns at once; takes the place of one of its name.

    Raises:
        ServingError: another application has the route.
    """
    try:
        serve.run_many(
            [RunTarget(application, name=name, route_prefix=route_prefix)],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
    except RayServeException as error:
        raise ServingError(
            f"application {name} cannot be deployed: {_last_line(str(error))} Stop that one first, or use another Ray"
        ) from error


def refuse_taken(name: str) -> None:
    """Refuses a name that an application of this Ray has.

    Raises:
        ServingError: it has one.
    """
    if name in serve.status().applications:
        raise ServingError(f"this Ray serves an application {name} already: stop it first, or serve on another Ray")


def wait_until_running(name: str, timeout_s: float, *, demand: str, stop: threading.Event | None = None) -> bool:
    """Until every deployment of the application has its replicas; False when `stop` was set before.

    `demand` says what the replicas ask Ray for.

    Raises:
        ServingError: a replica cannot be made.
        PlacementError: not within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    stop = stop or threading.Event()
    while True:
        application = serve.status().applications.get(name)
        if application is not None and application.status == ApplicationStatus.RUNNING:
            return True
        if application is not None and application.status in _FAILED:
            raise ServingError(f"application {name} cannot be deployed: {_why(application)}")
        if time.monotonic() > deadline:
            why = _why(application) if application is not None else "it is unknown to Serve"
            raise PlacementError(
                f"application {name} did not run within {timeout_s:g} s: its replicas ask for {demand}; {why}"
            )
        if stop.wait(_POLL_S):
            return False


def is_unhealthy(name: str) -> bool:
    """Whether a replica of the application has died and has no successor yet."""
    application = serve.status().applications.get(name)
    deployments = application.deployments.values() if application is not None else []
    return any(deployment.status == DeploymentStatus.UNHEALTHY for deployment in deployments)


def delete(name: str, *, wait: bool = False) -> None:
    """Takes an application away: its replicas finish what they are at, then end."""
    serve.delete(name, _blocking=wait)


def take_away(name: str, *, for_good: bool) -> None:
    """`delete`; with `for_good` until it is gone, and then Serve with it: nothing stays on a Ray that others use."""
    delete(name, wait=for_good)
    if for_good:
        stop_serve()


def stop_serve() -> None:
    """Ends Serve if this product has started it and no application is left on it."""
    if not serve_is_running() or internal_kv._internal_kv_get(_MARK, namespace=_MARK) != _controller_id():
        return
    if not serve.status().applications:
        serve.shutdown()


def _controller_id() -> bytes:
    return ray.get_actor(*_CONTROLLER)._actor_id.binary()


def _why(application: ApplicationStatusOverview) -> str:
    """What Serve says about it, on one line: of the first deployment that is not well, or of the whole."""
    for name, deployment in application.deployments.items():
        if deployment.status not in (DeploymentStatus.HEALTHY, DeploymentStatus.UPDATING) or deployment.message:
            return f"{name}: {_last_line(deployment.message) or deployment.status.value}"
    return _last_line(application.message) or application.status.value


def _last_line(text: str) -> str:
    """Of a traceback, what was raised."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:_LONGEST_REASON] if lines else ""
