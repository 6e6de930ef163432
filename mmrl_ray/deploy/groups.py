"""Which pods a run or a server needs: worker groups, from what its actors ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from mmrl_ray.config import Config
from mmrl_ray.config.deploy import PodsSection
from mmrl_ray.config.resources import ActorResources
from mmrl_ray.config.serving import DeploymentSection, ServeConfig, ServingSection

ROLE = "mmrl-role"
"""The label of a Ray node that says which actors it is for."""
LEARNER, ROLLOUT, SHARED, SERVING = "learner", "rollout", "shared", "serving"


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
        """Of its Ray nodes."""
        return {ROLE: self.name}


def shares_gpus(cfg: Config) -> bool:
    """Whether learners and rollout workers take turns on GPUs."""
    resources = cfg.resources
    return resources.placement == "shared" and resources.learner.gpus > 0 and resources.rollout.gpus > 0


def groups_of_run(cfg: Config, *, waiting: bool) -> list[WorkerGroup]:
    """The groups of a training run.

    Args:
        cfg: the run's.
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
    if cfg.resources.reward.cpus or cfg.resources.reward.gpus:
        roles["reward"] = SERVING
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
