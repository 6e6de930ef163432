"""Pods of a Ray cluster: one container that runs as a plain user, its probes, its volumes."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

from mmrl_ray.config.deploy import DeploySection, HeadSection, PodsSection
from mmrl_ray.deploy.groups import WorkerGroup

Manifest = dict[str, Any]

USER = 1000
"""Of the images in `docker/`."""
CONFIG_FOLDER = "/etc/mmrl"
GCS_PORT, DASHBOARD_PORT, AGENT_PORT, METRICS_PORT = 6379, 8265, 52365, 8080
_INSTANCE = "app.kubernetes.io/instance"
_VOLUME, _CONFIG = "storage", "config"


def labels(name: str) -> dict[str, str]:
    """Of every object and pod of one deployment."""
    return {_INSTANCE: name, "app.kubernetes.io/part-of": "mmrl"}


def selector(name: str) -> Manifest:
    """Selects all pods of one deployment."""
    return {"matchLabels": {_INSTANCE: name}}


def head_pod(deploy: DeploySection, name: str, env: Mapping[str, str], *, config: str | None, port: int) -> Manifest:
    """The template of the head's pod.

    Args:
        deploy: the section.
        name: of the deployment.
        env: environment variables.
        config: the ConfigMap with the run's config, if it is to be mounted.
        port: the gateway's.
    """
    head = deploy.head
    ports = {"gcs-server": GCS_PORT, "dashboard": DASHBOARD_PORT, "metrics": METRICS_PORT, "serve": port}
    container = _container("ray-head", deploy, env, ceil(head.cpus), 0, head.memory, ports)
    container |= _probes(_http("/api/local_raylet_healthz", AGENT_PORT), _http("/api/gcs_healthz", DASHBOARD_PORT))
    return _template(deploy, name, container, head, config=config)


def worker_pod(
    deploy: DeploySection, name: str, env: Mapping[str, str], group: WorkerGroup, *, serves_at: int | None
) -> Manifest:
    """The template of a worker group's pods; `serves_at` is the gateway's port where requests may come to them."""
    ports = {"metrics": METRICS_PORT} | ({"serve": serves_at} if serves_at is not None else {})
    container = _container("ray-worker", deploy, env, group.cpus, group.gpus, group.pods.memory, ports)
    alive = _http("/api/local_raylet_healthz", AGENT_PORT)
    container |= _probes(alive, _http("/-/healthz", serves_at) if serves_at is not None else alive)
    template = _template(deploy, name, container, group.pods)
    if group.gpus:  # nodes with GPUs are commonly tainted with them, so that nothing else lands there
        taint = {"key": deploy.gpu_resource, "operator": "Exists", "effect": "NoSchedule"}
        template["spec"].setdefault("tolerations", []).append(taint)
    if deploy.service_account is None:  # the head alone asks Kubernetes for pods
        template["spec"]["automountServiceAccountToken"] = False
    return template


def submitter_pod(deploy: DeploySection, name: str) -> Manifest:
    """The pod that submits a RayJob's entry point; the operator fills its command in."""
    resources = {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "1Gi"}}
    container = {
        "name": "ray-job-submitter",
        "image": deploy.image,
        "imagePullPolicy": deploy.pull_policy,
        "resources": resources,
        "securityContext": container_security(),
    }
    spec: Manifest = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": _pod_security(),
        "containers": [container],
    }
    if deploy.pull_secrets:
        spec["imagePullSecrets"] = [{"name": secret} for secret in deploy.pull_secrets]
    return {"metadata": {"labels": labels(name)}, "spec": spec}


def container_security() -> Manifest:
    """A plain user who cannot become another one."""
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _pod_security() -> Manifest:
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _template(
    deploy: DeploySection,
    name: str,
    container: Manifest,
    where: HeadSection | PodsSection,
    *,
    config: str | None = None,
) -> Manifest:
    volumes: list[Manifest] = []
    mounts: list[Manifest] = []
    storage = deploy.storage
    if storage.uri is None:
        volumes.append({"name": _VOLUME, "persistentVolumeClaim": {"claimName": storage.claim}})
        mounts.append({"name": _VOLUME, "mountPath": storage.mount_path})
    if config is not None:
        volumes.append({"name": _CONFIG, "configMap": {"name": config}})
        mounts.append({"name": _CONFIG, "mountPath": CONFIG_FOLDER, "readOnly": True})
    spec: Manifest = {"securityContext": _pod_security(), "containers": [{**container, "volumeMounts": mounts}]}
    optional: Manifest = {
        "volumes": volumes,
        "serviceAccountName": deploy.service_account,
        "imagePullSecrets": [{"name": secret} for secret in deploy.pull_secrets],
        "nodeSelector": where.node_selector,
        "tolerations": [section.model_dump(exclude_none=True) for section in where.tolerations],
    }
    spec |= {key: value for key, value in optional.items() if value}
    return {"metadata": {"labels": labels(name)}, "spec": spec}


def _container(
    name: str,
    deploy: DeploySection,
    env: Mapping[str, str],
    cpus: int,
    gpus: int,
    memory: str,
    ports: Mapping[str, int],
) -> Manifest:
    """Requests are limits for memory and GPUs: Ray plans with what it was given."""
    amounts: Manifest = {"cpu": str(cpus), "memory": memory} | ({deploy.gpu_resource: str(gpus)} if gpus else {})
    container: Manifest = {
        "name": name,
        "image": deploy.image,
        "imagePullPolicy": deploy.pull_policy,
        "env": [{"name": key, "value": value} for key, value in env.items()],
        "ports": [{"name": key, "containerPort": port} for key, port in ports.items()],
        "resources": {"requests": amounts, "limits": dict(amounts)},
        "securityContext": container_security(),
    }
    if deploy.env_secrets:
        container["envFrom"] = [{"secretRef": {"name": secret}} for secret in deploy.env_secrets]
    return container


def _probes(alive: Manifest, ready: Manifest) -> Manifest:
    """Asked over HTTP: the image needs no tools for it. Ray's health routes are the only ones without its token."""
    every = {"periodSeconds": 10, "timeoutSeconds": 5}
    return {
        "startupProbe": {**alive, "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 60},
        "livenessProbe": {**alive, **every, "failureThreshold": 12},
        "readinessProbe": {**ready, **every, "failureThreshold": 3},
    }


def _http(path: str, port: int) -> Manifest:
    return {"httpGet": {"path": path, "port": port}}
