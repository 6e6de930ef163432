"""`deploy:` — what manifests for Kubernetes need beside the run itself (`mmrl deploy render`).

How many actors there are and what each asks for is said by the other sections, once.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from mmrl_ray.config.sections import Section

_NAME = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
"""What Kubernetes lets an object be called."""
_QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi)?$"


class TolerationSection(Section):
    """A taint that pods put up with."""

    key: str | None = None
    """The taint; all of them where `operator` is `Exists`."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """Whether the taint's value matters."""
    value: str | None = None
    """The taint's value, with `Equal`."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """What the taint does; any by default."""


class PodsSection(Section):
    """One kind of pod."""

    memory: str = Field("16Gi", pattern=_QUANTITY)
    """Of one pod; a part of it is Ray's object store."""
    min_replicas: int | None = Field(None, ge=0)
    """Pods that always run; by default as many as a job needs, and none in a cluster that waits for jobs."""
    max_replicas: int | None = Field(None, ge=1)
    """Pods at most; by default as many as the config can use."""
    node_selector: dict[str, str] = {}
    """Labels of the Kubernetes nodes that may take them."""
    tolerations: list[TolerationSection] = []
    """Taints that they put up with."""

    @model_validator(mode="after")
    def _bounds_fit(self) -> Self:
        low, high = self.min_replicas, self.max_replicas
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_replicas={low} is above max_replicas={high}")
        return self


class ActorPodsSection(PodsSection):
    """Pods of a run's own actors."""

    actors_per_pod: int = Field(1, ge=1)
    """Actors that share a pod, such as the learners of one machine with several GPUs."""


class HeadSection(Section):
    """The head pod: Ray's control plane, and the driver of a run. It takes no actors that ask for a CPU."""

    cpus: float = Field(4.0, gt=0)
    """Of the pod."""
    memory: str = Field("16Gi", pattern=_QUANTITY)
    """Of the pod; the driver prepares data and statistics in it."""
    node_selector: dict[str, str] = {}
    """Labels of the Kubernetes nodes that may take it."""
    tolerations: list[TolerationSection] = []
    """Taints that it puts up with."""


class StorageSection(Section):
    """Where runs, data and models lie: a volume that every pod mounts, or an object store."""

    mount_path: str = Field("/mnt/mmrl", pattern=r"^/[^:]+$")
    """Where pods see the volume; relative paths of the config start here."""
    claim: str = Field("mmrl", pattern=_NAME)
    """Name of the PersistentVolumeClaim."""
    create: bool = True
    """Write the claim, too; otherwise it is there already."""
    size: str = Field("200Gi", pattern=_QUANTITY)
    """Of the claim that is written."""
    storage_class: str | None = None
    """One whose volumes many nodes can write (ReadWriteMany); the cluster's default otherwise."""
    uri: str | None = Field(None, pattern=r"^[a-z0-9]+://.+$")
    """Location on an object store instead of a volume, such as `s3://bucket/prefix`: relative paths start there."""


class RedisSection(Section):
    """Where Ray's head keeps its state, so that a new head goes on where the old one was."""

    address: str = "redis:6379"
    """Host and port, or a URL."""
    password_secret: str = Field("mmrl-redis", pattern=_NAME)
    """Secret with its password."""
    password_key: str = "password"
    """Key of the password in the secret."""


class DeploySection(Section):
    """Everything that is Kubernetes' affair and not the run's."""

    name: str | None = Field(None, pattern=_NAME)
    """What objects are called; by default the run's name, or the served model's."""
    namespace: str = Field("mmrl", pattern=_NAME)
    """Namespace of all objects."""
    image: str = "mmrl-ray:gpu"
    """Made by `docker/Dockerfile.gpu`, or by `docker/Dockerfile.cpu` where no actor has a GPU."""
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When nodes fetch the image."""
    pull_secrets: list[str] = []
    """Secrets for the image's registry."""
    service_account: str | None = None
    """Service account of the pods, for example one with access to a bucket."""
    token_secret: str = Field("mmrl-ray-token", pattern=_NAME)
    """Secret whose key `auth_token` is Ray's token; whoever has it runs code on the cluster."""
    env_secrets: list[str] = []
    """Secrets whose keys become environment variables: `HF_TOKEN`, `AWS_SECRET_ACCESS_KEY`, `PGPASSWORD`, …"""
    gpu_resource: str = "nvidia.com/gpu"
    """What the cluster calls its GPUs."""
    storage: StorageSection = StorageSection()
    """Where runs, data and models lie."""
    redis: RedisSection | None = RedisSection()
    """Fault tolerance of Ray's head in a RayCluster and a RayService; null for none. A RayJob has none: its driver
    dies with the head, and the retry goes on from the newest checkpoint on a cluster of its own."""
    retries: int = Field(3, ge=0)
    """How often a RayJob that failed is tried again; each time the run goes on from its newest checkpoint."""
    keep_s: int = Field(3600, ge=0)
    """A RayJob's cluster goes so long after the job."""
    idle_s: int = Field(300, ge=1)
    """A pod without work for so long is taken away, down to its group's minimum."""
    operator_namespace: str = Field("kuberay-operator", pattern=_NAME)
    """Where the KubeRay operator runs: it alone reaches Ray's ports from outside the cluster's own pods."""
    client_namespaces: list[str] = []
    """Namespaces whose pods may call the gateway; only the objects' own by default."""
    head: HeadSection = HeadSection()
    """The head pod."""
    learner: ActorPodsSection = ActorPodsSection()
    """Pods of learners; with `resources.placement: shared` on GPUs also of the rollout workers beside them."""
    rollout: ActorPodsSection = ActorPodsSection()
    """Pods of rollout workers."""
    serving: PodsSection = PodsSection()
    """Pods of policy, gateway and reward where they ask for CPUs or GPUs; one replica of each a pod."""
