"""The Serve config file (`serveConfigV2`) of a server, and checks that Ray's own schema leaves out.

The schema takes misspelt keys in silence, and more replicas at least than at most.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from mmrl_ray.config.serving import APP, GATEWAY, POLICY, REWARD, DeploymentSection, ServeConfig
from mmrl_ray.errors import ConfigError

BUILDER = "mmrl_ray.serving.deployments:build"


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
