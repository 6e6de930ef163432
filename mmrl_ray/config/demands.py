"""What the actors of a run ask Ray for: the one count of them, for whoever places, reserves or starts a Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mmrl_ray.config.schema import Config
from mmrl_ray.config.sections import ActorResources
from mmrl_ray.config.serving import ServingSection


@dataclass(frozen=True, slots=True)
class Demand:
    """Actors of one kind, all of which ask for the same."""

    kind: str
    """`learner`, `rollout`, …: what a user calls it."""
    count: int
    cpus: float
    gpus: float
    """Of one actor. Below 1 it is a part of one GPU, from 1 on they are whole ones."""
    count_key: str
    """The config key to lower if there is no room for so many."""
    share_key: str
    """And the one for what each asks for."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """A node without them takes none."""

    @property
    def amounts(self) -> str:
        """What one asks for, in words."""
        return f"{self.cpus:g} CPU, {self.gpus:g} GPU{self.where}"

    @property
    def where(self) -> str:
        """The labels in words; nothing for any node."""
        return f" on nodes labelled {label_pairs(self.labels)}" if self.labels else ""

    @property
    def bundle(self) -> dict[str, float]:
        """What one asks for, as Ray has it; without what is 0."""
        return {name: amount for name, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount}


def demands_of(cfg: Config, *, at_most: bool = False) -> list[Demand]:
    """Everything that a run asks Ray for; what asks for nothing is left out.

    Counts are those that a run cannot begin without, or with `at_most` those that it may grow to.
    """
    resources, serving = cfg.resources, cfg.serving or ServingSection()
    learners = cfg.learner.max_workers if at_most else cfg.learner.min_workers
    rollouts = cfg.rollout.most_workers if at_most else cfg.rollout.first_workers
    found = [
        _demand("learner", learners, resources.learner, "learner.workers", "resources.learner"),
        _demand("rollout", rollouts, resources.rollout, "rollout.workers", "resources.rollout"),
    ]
    if cfg.reward.host == "serve":
        key = "serving.reward.min_replicas"
        found.append(_demand("reward", serving.reward.min_replicas, resources.reward, key, "resources.reward"))
    if serving.live_policy:
        for kind, section in (("gateway", serving.gateway), ("policy", serving.policy)):
            key = f"serving.{kind}"
            found.append(
                _demand(kind, section.min_replicas, section.resources, f"{key}.min_replicas", f"{key}.resources")
            )
    return [demand for demand in found if demand.cpus or demand.gpus or demand.labels]


def cpu_processes(cfg: Config) -> int:
    """Processes of a run that calculate on CPUs: its learners, its first rollout workers, replicas of its servers."""
    resources, serving = cfg.resources, cfg.serving or ServingSection()
    counts = [(cfg.learner.max_workers, resources.learner), (cfg.rollout.first_workers, resources.rollout)]
    if cfg.reward.host == "serve" and resources.reward.cpus:  # one of words works while others wait
        counts.append((serving.reward.min_replicas, resources.reward))
    if serving.live_policy:
        counts.append((serving.policy.min_replicas, serving.policy.resources))
    return sum(count for count, share in counts if not share.gpus)


def torch_threads(cfg: Config, share: ActorResources, cores: int) -> int:
    """Threads of one learner or rollout worker on a node of so many cores.

    From the config and the machine alone, since sums depend on it bit for bit: how many workers there are later on
    does not count. More threads than cores, all in all, wait for each other most of the time.
    """
    if share.threads is not None:
        return share.threads
    return max(1, int(share.cpus), 0 if share.gpus else cores // max(1, cpu_processes(cfg)))


def label_pairs(labels: Mapping[str, str]) -> str:
    """`name=value, …`."""
    return ", ".join(f"{key}={value}" for key, value in labels.items())


def _demand(kind: str, count: int, share: ActorResources, count_key: str, share_key: str) -> Demand:
    return Demand(kind, count, share.cpus, share.gpus, count_key, share_key, share.node_labels)
