"""Pods of a Ray cluster: one container that runs as a plain user, its probes, its volumes, and a config's places there.

Which pods a run or a server needs: worker groups, from what its actors ask for.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import PurePosixPath
from typing import Any

from mmrl_ray.config import Config
from mmrl_ray.config.paths import Keys, with_places
from mmrl_ray.config.sections import ActorResources, DeploySection, HeadSection, PodsSection, StorageSection
from mmrl_ray.config.serving import DeploymentSection, ServeConfig, ServingSection
from mmrl_ray.errors import ConfigError

Manifest = dict[str, Any]

USER = 1000
"""Of the images in `docker/`."""
CONFIG_FOLDER = "/etc/mmrl"
GCS_PORT, DASHBOARD_PORT, AGENT_PORT, METRICS_PORT = 6379, 8265, 52365, 8080
_INSTANCE = "app.kubernetes.io/instance"
_VOLUME, _CONFIG = "storage", "config"
ROLE = "mmrl-role"
"""The label of a Ray node that says which actors it is for."""
LEARNER, ROLLOUT, SHARED, SERVING = "learner", "rollout", "shared", "serving"


def run_in_pods(cfg: Config) -> Config:
    """The same run with its data, models and folder on the storage that all pods share.

    Raises:
        ConfigError: a place that pods cannot see, one line each.
    """
    storage = cfg.deploy.storage
    local = {
        "sft": cfg.sft is not None,
        "data.scenes": cfg.data.scenes is not None,
        f"model.path={cfg.model.path}": cfg.model.path.startswith("builtin:"),
    }
    if storage.uri is not None and any(local.values()):
        what = ", ".join(name for name, holds in local.items() if holds)
        raise ConfigError(f"{what}: makes files that need a volume, but deploy.storage.uri names an object store")
    if cfg.data.preferences is not None:
        _refuse_sqlite("data.preferences.store", cfg.data.preferences.store)
    places: dict[Keys, str | None] = {
        ("run", "root"): cfg.run.root,
        ("data", "train"): cfg.data.train,
        ("model", "path"): _model(cfg.model.path),
        ("data", "eval"): cfg.data.eval,
        ("sft", "cache"): None if cfg.sft is None else cfg.sft.cache,
        ("data", "rollouts", "run"): None if cfg.data.rollouts is None else cfg.data.rollouts.run,
    }
    cfg = with_places(cfg, _seen(places, storage))
    serving = None if cfg.serving is None else _serving(cfg.serving, storage)
    return cfg.model_copy(update={"serving": serving})


def server_in_pods(cfg: ServeConfig) -> ServeConfig:
    """The same server with its models and adapters on the storage that all pods share, open to other pods.

    Raises:
        ConfigError: a place that pods cannot see, one line each.
    """
    places: dict[Keys, str | None] = {("adapters", name): place for name, place in cfg.adapters.items()}
    places |= {("model", "path"): _model(cfg.model.path), ("statistics",): cfg.statistics}
    cfg = with_places(cfg, _seen(places, cfg.deploy.storage))
    return cfg.model_copy(update={"serving": _serving(cfg.serving, cfg.deploy.storage)})


def _refuse_sqlite(key: str, url: str) -> None:
    if url.startswith("sqlite"):
        raise ConfigError(
            f"{key}={url} is a file of one machine, which pods do not share: name a PostgreSQL database, such as "
            f"--set {key}=postgresql+psycopg://mmrl@postgres/mmrl"
        )


def _serving(serving: ServingSection, storage: StorageSection) -> ServingSection:
    """Open to other pods, too."""
    if serving.preferences is not None:
        _refuse_sqlite("serving.preferences", serving.preferences)
    root = ("serving", "adapters_root")
    seen = _seen({root: serving.adapters_root}, storage)
    return serving.model_copy(update={"host": "0.0.0.0", "adapters_root": seen.get(root)})


def _model(path: str) -> str | None:
    """A hub's id stays what it is; a folder is written as only folders are."""
    return path if path.startswith(("/", "./", "../", "~")) else None


def _seen(places: Mapping[Keys, str | None], storage: StorageSection) -> dict[Keys, str]:
    """Each place that there is, by its keys, as pods see it."""
    problems = []
    found = {}
    for keys, place in places.items():
        if place is None:
            continue
        if "://" in place:
            found[keys] = place
            continue
        root = PurePosixPath("/" if storage.uri is not None else storage.mount_path)
        full = PurePosixPath(posixpath.normpath(root / place))
        away = full.is_absolute() and not full.is_relative_to(root)
        if place.startswith("~") or away or (storage.uri is not None and place.startswith("/")):
            where = storage.uri or f"the volume at {storage.mount_path}"
            key = ".".join(keys)
            problems.append(
                f"{key}={place} is not on {where}, which is all that pods see: put it there and write a relative path, "
                f"which starts there, such as --set {key}=data/{full.name}"
            )
        elif storage.uri is not None:
            found[keys] = f"{storage.uri.rstrip('/')}{full}"
        else:
            found[keys] = str(full)
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def labels(name: str) -> dict[str, str]:
    """The labels of every object and pod of one deployment."""
    return {_INSTANCE: name, "app.kubernetes.io/part-of": "mmrl"}


def selector(name: str) -> Manifest:
    """Selects all pods of one deployment."""
    return {"matchLabels": {_INSTANCE: name}}


def head_pod(deploy: DeploySection, name: str, env: Mapping[str, str], *, config: str | None, port: int) -> Manifest:
    """The template of the head's pod; `config` is the ConfigMap with the run's config, if it is to be mounted."""
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


@dataclass(frozen=True, slots=True)
class WorkerGroup:
    """Pods of one kind. CPUs and GPUs are those of one pod."""

    name: str
    cpus: int
    gpus: int
    min_replicas: int
    max_replicas: int
    pods: PodsSection

    @property
    def labels(self) -> dict[str, str]:
        """The labels of its Ray nodes."""
        return {ROLE: self.name}


def shares_gpus(cfg: Config) -> bool:
    """Whether learners and rollout workers take turns on GPUs."""
    return cfg.resources.takes_turns


def groups_of_run(cfg: Config, *, waiting: bool) -> list[WorkerGroup]:
    """The groups of a training run.

    Args:
        waiting: for a cluster without a job yet, whose groups begin empty.
    """
    deploy, resources = cfg.deploy, cfg.resources
    learners = _pods(cfg.learner.min_workers, cfg.learner.max_workers, deploy.learner.actors_per_pod)
    rollouts = _pods(cfg.rollout.first_workers, cfg.rollout.most_workers, deploy.rollout.actors_per_pod)
    if shares_gpus(cfg):
        count = deploy.learner.actors_per_pod
        rollouts = _pods(cfg.rollout.first_workers, cfg.rollout.most_workers, count)
        needed = (max(learners[0], rollouts[0]), max(learners[1], rollouts[1]))
        groups = [_group(SHARED, [resources.learner, resources.rollout], count, needed, deploy.learner, waiting)]
    else:
        groups = [
            _group(name, [share], pods.actors_per_pod, needed, pods, waiting)
            for name, share, needed, pods in (
                (LEARNER, resources.learner, learners, deploy.learner),
                (ROLLOUT, resources.rollout, rollouts, deploy.rollout),
            )
        ]
    deployments = _deployments_of_run(cfg)
    if any(d.resources.cpus or d.resources.gpus for d in deployments):
        groups.append(_serving_group(deployments, deploy.serving, waiting))
    return groups


def groups_of_server(cfg: ServeConfig) -> list[WorkerGroup]:
    """The one group of a server."""
    serving = cfg.serving
    deployments = [serving.gateway, serving.policy, *([serving.reward] if cfg.reward is not None else [])]
    return [_serving_group(deployments, cfg.deploy.serving, waiting=False)]


def with_labels(cfg: Config) -> Config:
    """The same run, each of whose actors asks for the group that is made for it: a rollout worker on a learner's pod
    would leave it no room."""
    roles = {"learner": SHARED, "rollout": SHARED} if shares_gpus(cfg) else {"learner": LEARNER, "rollout": ROLLOUT}
    for key, there in (("reward", True), ("teacher", cfg.teacher is not None)):
        share = getattr(cfg.resources, key)
        if there and (share.cpus or share.gpus):
            roles[key] = SERVING
    shares = {key: _labelled(getattr(cfg.resources, key), role) for key, role in roles.items()}
    update: dict[str, object] = {"resources": cfg.resources.model_copy(update=shares)}
    if cfg.serving is not None and cfg.serving.live_policy:
        policy = cfg.serving.policy
        policy = policy.model_copy(update={"resources": _labelled(policy.resources, SERVING)})
        update["serving"] = cfg.serving.model_copy(update={"policy": policy})
    return cfg.model_copy(update=update)


def _labelled(share: ActorResources, role: str) -> ActorResources:
    return share.model_copy(update={"node_labels": {**share.node_labels, ROLE: role}})


def _deployments_of_run(cfg: Config) -> list[DeploymentSection]:
    serving = cfg.serving or ServingSection()
    found: list[DeploymentSection] = []
    if cfg.reward.host == "serve":
        found.append(serving.reward.model_copy(update={"resources": cfg.resources.reward}))
    if cfg.teacher is not None:
        count = cfg.teacher.workers
        found.append(
            serving.reward.model_copy(
                update={"resources": cfg.resources.teacher, "min_replicas": count, "max_replicas": count}
            )
        )
    if serving.live_policy:
        found += [serving.gateway, serving.policy]
    return found


def _serving_group(deployments: Sequence[DeploymentSection], pods: PodsSection, waiting: bool) -> WorkerGroup:
    needed = (max(d.min_replicas for d in deployments), max(d.max_replicas for d in deployments))
    return _group(SERVING, [d.resources for d in deployments], 1, needed, pods, waiting)


def _group(
    name: str, shares: Sequence[ActorResources], count: int, needed: tuple[int, int], pods: PodsSection, waiting: bool
) -> WorkerGroup:
    """`count` times one actor of each share in a pod; `needed` pods at least and at most."""
    low = pods.min_replicas if pods.min_replicas is not None else (0 if waiting else needed[0])
    high = pods.max_replicas if pods.max_replicas is not None else max(low, needed[1])
    # Rounded up after the sum: the fractions of one GPU share it.
    cpus = max(1, ceil(count * sum(share.cpus for share in shares)))
    gpus = ceil(count * sum(share.gpus for share in shares))
    return WorkerGroup(name, cpus, gpus, min(low, high), high, pods)


def _pods(low: int, high: int, actors: int) -> tuple[int, int]:
    return ceil(low / actors), ceil(high / actors)
