"""The plan of a run held against a cluster that is there: `mmrl train CONFIG --dry-run --address …`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray._private import state

from mmrl_ray.config import Config
from mmrl_ray.config.demands import demands_of
from mmrl_ray.errors import RunError
from mmrl_ray.runs.cluster import node_local_root_refused, ray_session
from mmrl_ray.runs.placement import Node, place, unplaced_lines

_MOST_ADDED = 1000
"""Nodes of one group that an autoscaler could add; more would not change the answer."""


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
