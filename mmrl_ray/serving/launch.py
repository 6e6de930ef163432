"""Applications on Ray Serve: a server's config file, and starting it, putting applications on it, taking them away.

The config file is `serveConfigV2`, with checks that Ray's own schema leaves out. The schema takes misspelt keys in
silence, and more replicas at least than at most.
"""

from __future__ import annotations

import difflib
import logging
import socket
import threading
import time
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from pydantic import BaseModel, ValidationError
from ray import serve
from ray.experimental import internal_kv
from ray.serve import Application
from ray.serve.api import RunTarget
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, DeploymentStatus, ServeDeploySchema

from mmrl_ray.config.serving import APP, GATEWAY, POLICY, REWARD, DeploymentSection, ServeConfig
from mmrl_ray.errors import ConfigError, PlacementError, ServingError, last_line

_CONTROLLER = ("SERVE_CONTROLLER_ACTOR", "serve")
"""Name and namespace of the one actor that every Serve has."""
_MARK = b"mmrl-serve"
"""Key in Ray's own store: the id of the controller of a Serve that this product has started."""
_POLL_S = 0.1
_FAILED = (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY)
BUILDER = "mmrl_ray.serving.deployments:build"


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
        reason = taken if _listens(host, port) else last_line(str(error))
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
            f"application {name} cannot be deployed: {last_line(str(error))} Stop that one first, or use another Ray"
        ) from error


def refuse_taken(name: str) -> None:
    """Refuses, with a ServingError, a name that an application of this Ray has."""
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
            return f"{name}: {last_line(deployment.message) or deployment.status.value}"
    return last_line(application.message) or application.status.value


def serve_config(cfg: ServeConfig, *, insecure: bool = False) -> dict[str, Any]:
    """What `serve deploy` takes; it needs no file but those that `cfg` names.

    Raises:
        ConfigError: Ray would not take it, or would take it for something else.
    """
    config = {
        "proxy_location": "EveryNode",
        "http_options": {"host": cfg.serving.host, "port": cfg.serving.port},
        "applications": [
            {
                "name": APP,
                "route_prefix": "/",
                "import_path": BUILDER,
                "args": {"config": cfg.model_dump(mode="json", exclude={"deploy"}), "insecure": insecure},
                "deployments": [{"name": name, **options} for name, options in deployment_options(cfg).items()],
            }
        ],
    }
    check_serve_config(config)
    return config


def deployment_options(cfg: ServeConfig) -> dict[str, dict[str, Any]]:
    """Options of each deployment by its name."""
    serving = cfg.serving
    sections = {GATEWAY: serving.gateway, POLICY: serving.policy}
    if cfg.reward is not None:
        sections[REWARD] = serving.reward
    return {name: options_of(section) for name, section in sections.items()}


def options_of(section: DeploymentSection) -> dict[str, Any]:
    """A deployment's section in Serve's words."""
    share = section.resources
    labels = {"label_selector": dict(share.node_labels)} if share.node_labels else {}
    return {
        "autoscaling_config": {
            "min_replicas": section.min_replicas,
            "max_replicas": section.max_replicas,
            "target_ongoing_requests": section.target_ongoing_requests,
        },
        "max_ongoing_requests": section.max_ongoing_requests,
        "max_queued_requests": section.max_queued_requests,
        "health_check_period_s": section.health_check_period_s,
        "health_check_timeout_s": section.health_check_timeout_s,
        "graceful_shutdown_timeout_s": section.graceful_shutdown_timeout_s,
        "graceful_shutdown_wait_loop_s": section.graceful_shutdown_wait_loop_s,
        "ray_actor_options": {"num_cpus": share.cpus, "num_gpus": share.gpus, **labels},
        "logging_config": {"enable_access_log": False},
    }


def check_serve_config(config: Mapping[str, Any]) -> None:
    """Holds a Serve config file against Ray's schema, the autoscaler's, our own, and for keys that none of them knows.

    Raises:
        ConfigError: one line a problem.
    """
    problems = list(_unknown_keys(config, ServeDeploySchema, ""))
    for where, model, value in _parts(config):
        try:
            model.model_validate(value)
        except ValidationError as error:
            for each in error.errors():
                place = ".".join(map(str, (*filter(None, [where]), *each["loc"])))
                problems.append(f"{place}: {each['msg']}")
    if problems:
        raise ConfigError("\n".join(problems))


def _parts(config: Mapping[str, Any]) -> Iterator[tuple[str, type[BaseModel], Any]]:
    """Each part of the file with the model it must fit."""
    yield "", ServeDeploySchema, config
    for i, application in enumerate(_listed(config.get("applications"))):
        where = f"applications.{i}"
        if application.get("import_path") == BUILDER:
            arguments = application.get("args")
            yield f"{where}.args.config", ServeConfig, arguments.get("config") if isinstance(arguments, dict) else None
        for j, deployment in enumerate(_listed(application.get("deployments"))):
            if "autoscaling_config" in deployment:
                scaling = deployment["autoscaling_config"]
                yield f"{where}.deployments.{j}.autoscaling_config", AutoscalingConfig, scaling


def _unknown_keys(value: Any, model: type[BaseModel], where: str) -> Iterator[str]:
    """Keys that `model`, or a model inside it, does not have. A field that takes any mapping is not looked into."""
    if not isinstance(value, Mapping):
        return
    known = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
    for key, inner in value.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            yield f"{where}{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
            continue
        inside = _model_in(known[key])
        if inside is not None:
            for i, each in enumerate(inner if isinstance(inner, list) else [inner]):
                place = f"{where}{key}.{i}." if isinstance(inner, list) else f"{where}{key}."
                yield from _unknown_keys(each, inside, place)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field's type mentions, if any."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for each in typing.get_args(annotation) if (found := _model_in(each)) is not None), None)


def _listed(value: Any) -> list[Mapping[str, Any]]:
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []
