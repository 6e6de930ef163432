"""The `spec` of a RayCluster, which a RayJob and a RayService hold, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version

from mmrl_ray.config.deploy import DeploySection
from mmrl_ray.deploy.groups import WorkerGroup
from mmrl_ray.deploy.pods import Manifest, container_security, head_pod, worker_pod


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
        deploy: the section.
        name: of the deployment.
        groups: worker groups.
        port: the gateway's.
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
