"""Which node would take which actor of a run: what each asks for, held against what nodes have.

Pure: nodes are data. The same first fit, the largest first, is done on what the nodes have in all and on what is free.

The plan of a run held against a cluster that is there: `mmrl train CONFIG --dry-run --address …`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray._private import state

from mmrl_ray.config import Config
from mmrl_ray.config.demands import Demand, demands_of, label_pairs
from mmrl_ray.errors import RunError
from mmrl_ray.training.cluster import node_local_root_refused, ray_session

_ROUNDING = 1e-6
"""Ray counts in ten-thousandths; sums of fractions are a little off."""
_MOST_ADDED = 1000
"""Nodes of one group that an autoscaler could add; more would not change the answer."""


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
        there = f"no node is labelled {label_pairs(demand.labels)}"
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


@dataclass
class PlacementCheck:
    """What was found out."""

    lines: list[str] = field(default_factory=list)
    """The nodes, and the actors on each."""
    unplaced: list[str] = field(default_factory=list)
    """What has no room, not even on nodes that the autoscaler may add."""
    blocking: list[str] = field(default_factory=list)
    """That, and what else would stop the run on this cluster."""


def check_placement(cfg: Config, address: str) -> PlacementCheck:
    """Joins the cluster, starts nothing on it, and leaves it.

    Raises:
        RunError: it cannot be joined.
    """
    found = PlacementCheck()
    with ray_session(cfg, address=address):
        there = [_node(node, node["Resources"]) for node in ray.nodes() if node["Alive"]]
        left = state.available_resources_per_node()
        free = [_node(node, left.get(node["NodeID"], {})) for node in ray.nodes() if node["Alive"]]
        addable = _addable()
        try:
            node_local_root_refused(cfg.run.root)
        except RunError as error:
            found.blocking.append(str(error))
    demands = demands_of(cfg)
    plan = place(demands, there)
    for node, (name, actors) in zip(there, plan.nodes, strict=True):
        found.lines.append(f"node {name}: {node.cpus:g} CPU, {node.gpus:g} GPU: {', '.join(actors) or 'nothing'}")
    anywhere = [replace(demand, labels={}) for demand in demands]  # Ray does not tell the labels of nodes to come
    if plan.missing and not place(anywhere, addable).missing:
        found.lines.append("not all of it fits on the nodes that are there; it fits on nodes the autoscaler may add")
    elif plan.missing:
        found.unplaced = unplaced_lines(plan, there)
        found.blocking += found.unplaced
    elif busy := place(demands, free).missing:
        names = ", ".join(f"{short} {demand.kind}" for demand, short in busy)
        found.lines.append(
            f"busy now: {names} would wait for others to end, at most {cfg.resources.placement_timeout_s:g} s"
        )
    return found


def _node(node: Mapping[str, Any], resources: Mapping[str, float]) -> Node:
    name = node.get("NodeManagerHostname") or node["NodeManagerAddress"]
    return Node(str(name), resources.get("CPU", 0.0), resources.get("GPU", 0.0), node.get("Labels") or {})


def _addable() -> list[Node]:
    """All nodes that the autoscaler, if there is one, could run at a time."""
    config = state.state.get_cluster_config()
    nodes: list[Node] = []
    for group in config.node_group_configs if config is not None else ():
        resources = dict(group.resources)
        count = group.max_count if 0 <= group.max_count <= _MOST_ADDED else _MOST_ADDED
        nodes += [Node(group.name, resources.get("CPU", 0), resources.get("GPU", 0))] * count
    return nodes
