"""Which node would take which actor of a run: what each asks for, held against what nodes have.

Pure: nodes are data. The same first fit, the largest first, is done on what the nodes have in all and on what is free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mmrl_ray.config.demands import Demand, label_pairs

_ROUNDING = 1e-6
"""Ray counts in ten-thousandths; sums of fractions are a little off."""


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
