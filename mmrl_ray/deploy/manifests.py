"""`mmrl deploy render`: a config in, the Kubernetes objects of a job, a cluster or a server out.

config ──paths──▶ as pods see it ──groups──▶ pods of each kind ──▶ RayJob | RayCluster | RayService
                                                                  + ConfigMap, volume claim, network policy

All three hold the `spec` of a RayCluster (`cluster_spec`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import yaml

from mmrl_ray.config import Config
from mmrl_ray.config.load import parse_as
from mmrl_ray.config.problems import dump_yaml
from mmrl_ray.config.sections import DeploySection
from mmrl_ray.config.serving import ServeConfig, ServingSection
from mmrl_ray.deploy.pods import (
    CONFIG_FOLDER,
    DASHBOARD_PORT,
    Manifest,
    WorkerGroup,
    container_security,
    groups_of_run,
    groups_of_server,
    head_pod,
    labels,
    run_in_pods,
    selector,
    server_in_pods,
    submitter_pod,
    with_labels,
    worker_pod,
)
from mmrl_ray.errors import ConfigError
from mmrl_ray.serving.haproxy import FAST

Kind = Literal["rayjob", "rayservice", "raycluster"]

_API = "ray.io/v1"
_CONFIG_FILE = "config.yaml"
_STATISTICS = "reward/statistics.json"
"""Where a run keeps those of its training references."""
_LONGEST_NAME = 47
"""The operator adds suffixes to a RayJob's and a RayService's name, and refuses what is longer."""


def render(cfg: Config | ServeConfig, kind: Kind) -> list[Manifest]:
    """The objects, in the order in which they are to be applied.

    Raises:
        ConfigError: the config does not go with this kind, or names what pods cannot see.
    """
    if kind == "rayservice":
        return _service(cfg if isinstance(cfg, ServeConfig) else server_of_run(cfg))
    if isinstance(cfg, ServeConfig):
        raise ConfigError(f"--kind {kind} is for a run, and this config only serves: use --kind rayservice")
    return _job(cfg) if kind == "rayjob" else _cluster(cfg)


def dump(manifests: Sequence[Manifest]) -> str:
    """One YAML file with all of them."""
    return yaml.dump_all(manifests, Dumper=_Dumper, sort_keys=False, explicit_start=True, width=120, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Texts of several lines, which are files of their own, stay readable; what occurs twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        """Always: an anchor between two objects is no YAML of Kubernetes."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def server_of_run(cfg: Config) -> ServeConfig:
    """What serves a run when it is done: its base, and its adapter under the run's name.

    Raises:
        ConfigError: the base is made by the run itself, or the run's name is no model's id.
    """
    if cfg.sft is not None or cfg.model.path.startswith("builtin:"):
        raise ConfigError(
            f"the base of {cfg.run.name} is made by the run itself, in sft.cache: write a config for `mmrl serve` with "
            "`model: {path: …}` naming that folder, and render that"
        )
    location = f"{cfg.run.root.rstrip('/')}/{cfg.run.name}"
    whole = {
        "model": cfg.model.model_dump(mode="json"),
        "adapters": {cfg.run.name: location},
        "prompt": cfg.data.prompt,
        "reward": cfg.reward.model_dump(mode="json"),
        "statistics": f"{location}/{_STATISTICS}" if cfg.reward.needs_statistics else None,
        "serving": (cfg.serving or ServingSection()).model_dump(mode="json"),
        "deploy": cfg.deploy.model_dump(mode="json"),
    }
    return parse_as(ServeConfig, dump_yaml(whole), "mmrl deploy render")


def _job(cfg: Config) -> list[Manifest]:
    name, deploy = _name(cfg.deploy, cfg.run.name), cfg.deploy
    inside = with_labels(run_in_pods(cfg))
    if cfg.serving is not None and cfg.serving.live_policy:
        _require_database(cfg.serving)
    port = (cfg.serving or ServingSection()).port
    config = f"{name}-config"
    spec: Manifest = {
        # A retry finds the run of the try before, and goes on with it.
        "entrypoint": f"mmrl train {CONFIG_FOLDER}/{_CONFIG_FILE} --resume-or-start --address auto",
        "submissionMode": "K8sJobMode",
        "backoffLimit": deploy.retries,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": deploy.keep_s,
        "submitterPodTemplate": submitter_pod(deploy, name),
        "rayClusterSpec": cluster_spec(
            deploy, name, groups_of_run(cfg, waiting=False), port=port, config=config, survives_head=False
        ),
    }
    data = {_CONFIG_FILE: dump_yaml(inside.model_dump(mode="json", exclude={"deploy"}))}
    mounted = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(deploy, name, config), "data": data}
    return _objects(deploy, name, port, "RayJob", spec, mounted)


def _cluster(cfg: Config) -> list[Manifest]:
    """For jobs that are submitted to it: its groups grow with what they ask for."""
    name, deploy = _name(cfg.deploy, cfg.run.name), cfg.deploy
    port = (cfg.serving or ServingSection()).port
    spec = cluster_spec(deploy, name, groups_of_run(cfg, waiting=True), port=port)
    return _objects(deploy, name, port, "RayCluster", spec)


def _service(cfg: ServeConfig) -> list[Manifest]:
    # Imported here: Ray's own schema is what the Serve config is checked against.
    from mmrl_ray.serving.launch import serve_config

    deploy, serving = cfg.deploy, cfg.serving
    _require_database(serving)
    if cfg.reward is not None and cfg.reward.needs_statistics and cfg.statistics is None:
        raise ConfigError("statistics: the reward's parts need them: name the file, or set reward=null")
    name = _name(deploy, serving.model_id or Path(cfg.model.path).name)
    spec: Manifest = {
        "serveConfigV2": dump_yaml(serve_config(server_in_pods(cfg))),
        # Clients come to pods with a replica; the head keeps to its own work.
        "excludeHeadPodFromServeSvc": True,
        "rayClusterConfig": cluster_spec(deploy, name, groups_of_server(cfg), port=serving.port, env=FAST, serves=True),
    }
    return _objects(deploy, name, serving.port, "RayService", spec)


def _objects(
    deploy: DeploySection, name: str, port: int, kind: str, spec: Manifest, *mounted: Manifest
) -> list[Manifest]:
    """One of Ray's objects, behind what it stands on."""
    ray = {"apiVersion": _API, "kind": kind, "metadata": _metadata(deploy, name), "spec": spec}
    return [*_claim(deploy), *mounted, _network_policy(deploy, name, port), ray]


def _require_database(serving: ServingSection) -> None:
    if serving.database is None:
        raise ConfigError(
            "serving.database: gateways on several pods need one database of keys, and a pod's own files go with it: "
            "name one, such as --set serving.database=postgresql+psycopg://mmrl@postgres/mmrl, with its password as "
            "PGPASSWORD in a secret of deploy.env_secrets"
        )


def _claim(deploy: DeploySection) -> list[Manifest]:
    storage = deploy.storage
    if storage.uri is not None or not storage.create:
        return []
    spec: Manifest = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": storage.size}}}
    if storage.storage_class is not None:
        spec["storageClassName"] = storage.storage_class
    metadata = {"name": storage.claim, "namespace": deploy.namespace, "labels": {"app.kubernetes.io/part-of": "mmrl"}}
    return [{"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}]


def _network_policy(deploy: DeploySection, name: str, port: int) -> Manifest:
    """The pods reach each other; the operator reaches dashboard and gateway; clients reach the gateway alone."""
    own: dict[str, Any] = {"podSelector": selector(name)}
    operator = {"namespaceSelector": _namespace(deploy.operator_namespace)}
    clients = [{"podSelector": {}}, *({"namespaceSelector": _namespace(each)} for each in deploy.client_namespaces)]
    ingress = [
        {"from": [own]},
        {"from": [operator], "ports": [_tcp(DASHBOARD_PORT), _tcp(port)]},
        {"from": clients, "ports": [_tcp(port)]},
    ]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(deploy, name),
        "spec": {"podSelector": selector(name), "policyTypes": ["Ingress"], "ingress": ingress},
    }


def _namespace(name: str) -> Manifest:
    return {"matchLabels": {"kubernetes.io/metadata.name": name}}


def _tcp(port: int) -> Manifest:
    return {"protocol": "TCP", "port": port}


def _metadata(deploy: DeploySection, name: str, own: str | None = None) -> Manifest:
    return {"name": own or name, "namespace": deploy.namespace, "labels": labels(name)}


def _name(deploy: DeploySection, said: str) -> str:
    """What Kubernetes lets the objects be called."""
    name = deploy.name or re.sub(r"[^a-z0-9]+", "-", said.lower()).strip("-")
    if not re.match("[a-z]", name) or len(name) > _LONGEST_NAME:
        raise ConfigError(
            f"deploy.name={name}: Kubernetes wants up to {_LONGEST_NAME} lower-case letters, digits and dashes, a "
            "letter first: set deploy.name"
        )
    return name


def cluster_spec(
    deploy: DeploySection,
    name: str,
    groups: Sequence[WorkerGroup],
    *,
    port: int,
    config: str | None = None,
    env: Mapping[str, str] | None = None,
    serves: bool = False,
    survives_head: bool = True,
) -> Manifest:
    """Head and worker groups, with Ray's token, the autoscaler, and the head's state in Redis.

    Args:
        config: ConfigMap that the head mounts.
        env: environment variables of every Ray process, beside those that all have.
        serves: whether requests come to the workers.
        survives_head: whether a new head is to go on where the old one was.
    """
    variables = _environment(deploy) | dict(env or {})
    spec: Manifest = {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token", "secretName": deploy.token_secret},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": _autoscaler(deploy),
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            "enableIngress": False,
            # No CPUs: what asks for any goes to the groups. The dashboard listens for the operator and for submitted
            # jobs; the network policy keeps everybody else out.
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
            "template": head_pod(deploy, name, variables, config=config, port=port),
        },
        "workerGroupSpecs": [
            {
                "groupName": group.name,
                "replicas": group.min_replicas,
                "minReplicas": group.min_replicas,
                "maxReplicas": group.max_replicas,
                "labels": group.labels,
                "rayStartParams": {},
                "template": worker_pod(deploy, name, variables, group, serves_at=port if serves else None),
            }
            for group in groups
        ],
    }
    if survives_head and deploy.redis is not None:
        redis = deploy.redis
        secret = {"name": redis.password_secret, "key": redis.password_key}
        spec["gcsFaultToleranceOptions"] = {
            "redisAddress": redis.address,
            "redisPassword": {"valueFrom": {"secretKeyRef": secret}},
        }
    return spec


def _environment(deploy: DeploySection) -> dict[str, str]:
    """Of every Ray process; its token comes from `authOptions`."""
    found = {"RAY_USAGE_STATS_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false"}
    if deploy.storage.uri is None:  # a model is fetched from its hub once, not once a pod
        found["HF_HOME"] = f"{deploy.storage.mount_path.rstrip('/')}/huggingface"
    return found


def _autoscaler(deploy: DeploySection) -> Manifest:
    """Its second version, which knows labels of nodes."""
    return {
        "version": "v2",
        "idleTimeoutSeconds": deploy.idle_s,
        "imagePullPolicy": deploy.pull_policy,
        "resources": {"requests": {"cpu": "200m", "memory": "512Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}},
        "securityContext": container_security(),
    }
