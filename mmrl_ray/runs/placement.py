"""Which node would take which actor of a run: what each asks for, held against what nodes have.

Pure: nodes are data. The same first fit, the largest first, is done on what the nodes have in all and on what is free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mmrl_ray.config import Config
from mmrl_ray.config.resources import ActorResources
from mmrl_ray.config.serving import ServingSection

_ROUNDING = 1e-6
"""Ray counts in ten-thousandths; sums of fractions are a little off."""


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
        return f" on nodes labelled {_pairs(self.labels)}" if self.labels else ""


@dataclass(frozen=True, slots=True)
class Node:
    """One node, or one that could be added."""

    name: str
    cpus: float
    gpus: float
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where everything would go."""

    nodes: tuple[tuple[str, tuple[str, ...]], ...]
    """By node, the actors on it."""
    missing: tuple[tuple[Demand, int], ...]
    """Demands with how many of them found no room."""


def demands_of(cfg: Config) -> list[Demand]:
    """Everything that a run asks Ray for; what asks for nothing is left out."""
    resources, serving = cfg.resources, cfg.serving or ServingSection()
    found = [
        _demand("learner", cfg.learner.min_workers, resources.learner, "learner.workers", "resources.learner"),
        _demand("rollout", cfg.rollout.first_workers, resources.rollout, "rollout.workers", "resources.rollout"),
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


def place(demands: Sequence[Demand], nodes: Sequence[Node]) -> Placement:
    """First fit, the largest actors first; those that only some nodes may take come before the others."""
    rooms = [_Room(node) for node in nodes]
    missing: list[tuple[Demand, int]] = []
    for demand in sorted(demands, key=lambda d: (not d.labels, -d.gpus, -d.cpus)):
        placed = 0
        while placed < demand.count and any(room.take(demand, f"{demand.kind} {placed}") for room in rooms):
            placed += 1
        if placed < demand.count:
            missing.append((demand, demand.count - placed))
    return Placement(tuple((room.node.name, tuple(room.actors)) for room in rooms), tuple(missing))


def unplaced_lines(placement: Placement, nodes: Sequence[Node]) -> list[str]:
    """One line a kind of actor without room: what it asks for, what there is, and what would do."""
    return [_unplaced_line(demand, short, nodes) for demand, short in placement.missing]


def _unplaced_line(demand: Demand, short: int, nodes: Sequence[Node]) -> str:
    fitting = demand.count - short
    labelled = [node for node in nodes if _has_labels(node, demand)]
    if demand.labels and not labelled:
        there = f"no node is labelled {_pairs(demand.labels)}"
    elif labelled:
        most_gpus, most_cpus = max(node.gpus for node in labelled), max(node.cpus for node in labelled)
        there = (
            f"the {len(labelled)} nodes have up to {most_cpus:g} CPU and {most_gpus:g} GPU each, some of it for the "
            "run's other actors"
        )
    else:
        there = "the cluster has no node"
    remedies = [f"add room for {short} more"]
    if fitting:
        remedies.append(f"set {demand.count_key}={fitting}")
    remedies.append(f"lower {demand.share_key}")
    return (
        f"{short} of {demand.count} {demand.kind} actors have no node, each asks for {demand.amounts}; {there}: "
        f"{', or '.join(remedies)}"
    )


class _Room:
    """What is left of a node."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.actors: list[str] = []
        self._cpus = node.cpus
        # One number a GPU: a fraction must come from a single one. A busy node may have a part of one free.
        self._gpus = [1.0] * int(node.gpus + _ROUNDING)
        if node.gpus - len(self._gpus) > _ROUNDING:
            self._gpus.append(node.gpus - len(self._gpus))

    def take(self, demand: Demand, name: str) -> bool:
        """Whether there was room, which is then taken."""
        if not _has_labels(self.node, demand) or demand.cpus > self._cpus + _ROUNDING:
            return False
        # The fullest GPU that still has room: whole ones stay whole for those who need them.
        share = min(demand.gpus, 1.0)
        wanted = max(1, round(demand.gpus)) if demand.gpus else 0
        usable = sorted((free, i) for i, free in enumerate(self._gpus) if free + _ROUNDING >= share)
        if len(usable) < wanted:
            return False
        for _, i in usable[:wanted]:
            self._gpus[i] -= share
        self._cpus -= demand.cpus
        self.actors.append(name)
        return True


def _has_labels(node: Node, demand: Demand) -> bool:
    return all(node.labels.get(key) == value for key, value in demand.labels.items())


def _pairs(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in labels.items())


def _demand(kind: str, count: int, share: ActorResources, count_key: str, share_key: str) -> Demand:
    return Demand(kind, count, share.cpus, share.gpus, count_key, share_key, share.node_labels)
