"""What would stop a run, found in seconds and before its folder exists; and which node would take which of its actors.

Placement holds what each actor asks for against what nodes have: the same first fit, the largest first, on what the
nodes have in all and on what is free. It is pure: nodes are data. `check_placement` is
`mmrl train CONFIG --dry-run --address …`, which asks a cluster that is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray._private import state

from mmrl_ray.config import Config
from mmrl_ray.config.paths import local_paths
from mmrl_ray.config.schema import Demand, label_pairs
from mmrl_ray.config.sections import ModelSection, TeacherSection
from mmrl_ray.data.held_out import Overlap, overlap_with_data, overlap_with_hashes, same_place
from mmrl_ray.data.samples import Quarantine, Sample, iter_references, read_split
from mmrl_ray.errors import DataError, RunError
from mmrl_ray.policy.generation.vllm.process import check as check_vllm
from mmrl_ray.policy.generation.vllm.server import VllmServer
from mmrl_ray.rollouts.pool_settings import placed_demands
from mmrl_ray.training.cluster import node_local_root_refused, ray_session
from mmrl_ray.training.offline import logged_pictures, trained_pictures

if TYPE_CHECKING:
    from mmrl_ray.policy.model import Policy

_ROUNDING = 1e-6
"""Ray counts in ten-thousandths; sums of fractions are a little off."""
_SERVER_S = 60.0
"""For the answers of a server that samples: it may be busy with another run."""
_MOST_ADDED = 1000
"""Nodes of one group that an autoscaler could add; more would not change the answer."""


def first_sample(cfg: Config) -> Sample:
    """The first good training row: one that is broken does not stand for the set.

    Raises:
        DataError: the training split cannot be read, or has no good row.
        QuarantineError: more broken rows before it than a run tolerates.
    """
    quarantine = Quarantine(cfg.data.max_quarantined, source=cfg.data.train)
    return read_split(cfg.data.train, prompt=cfg.data.prompt, limit=1, quarantine=quarantine)[0]


def check_references(cfg: Config) -> None:
    """Whether the training split has what document frequencies and rewards are made of.

    Raises:
        DataError: it cannot be read, no row has a reference, or one that an agent is paid by has none.
    """
    if not any(iter_references(cfg.data.train)):
        raise DataError(f"no row of {cfg.data.train} has a reference: a run needs some, for its document frequencies")
    if (agent := cfg.agent) is not None:
        rows = islice(iter_references(cfg.data.train), agent.max_pictures)
        bare = next((number for number, references in enumerate(rows) if not references), None)
        if bare is not None:
            raise DataError(f"{cfg.data.train}: row {bare} has no references to be paid by; leave it out")


def check_engine(cfg: Config) -> str:
    """Whether what samples is on this machine, where the run's workers are; what it is, in words.

    Raises:
        ConfigError: there is no interpreter with vLLM, which `rollout.engine` asks for, vLLM has no such argument, or
            the server that it names is none that a run can use.
        ProcessError: that server is not there, or that interpreter gives no answer.
    """
    engine = cfg.rollout.engine
    if engine.kind == "vllm":
        return f"vLLM of {check_vllm(engine.python, engine.arguments, engine.start_timeout_s)}"
    if engine.url is None:
        return "the worker itself"
    with VllmServer(engine.url, api_key_env=engine.api_key_env, timeout_s=_SERVER_S) as server:
        server.wait(0.0)
        server.check_logprobs(server.check(engine.model)[0])
    return f"vLLM at {engine.url}"


def refuse_moved(cfg: Config, *, base_is_kept: bool) -> None:
    """Refuses to go on with a run whose data or model are not where its config, written then, says.

    Raises:
        DataError: one line a place, with what to add to the command.
    """
    needed = [*(() if cfg.data.scenes else ("data.train", "data.eval")), *(() if base_is_kept else ("model.path",))]
    places = {key: place for key, place in local_paths(cfg).items() if key in needed}
    missing = {key: place for key, place in places.items() if not Path(place).expanduser().exists()}
    if missing:
        raise DataError(
            "\n".join(
                f"{key}={place} is not there any more: where it was moved, add --set {key}=PLACE"
                for key, place in missing.items()
            )
        )


def held_out_quarantine(cfg: Config) -> Quarantine:
    """For `evaluation_split`: as many broken rows as the run tolerates."""
    return Quarantine(cfg.data.max_quarantined, source=cfg.data.eval or "")


def evaluation_split(cfg: Config, quarantine: Quarantine) -> list[Sample]:
    """The held-out samples a run is evaluated on; none without `data.eval`. `quarantine` has those that are broken.

    Raises:
        DataError: the split is missing or empty, no row is good, or rows have no references.
        QuarantineError: more broken rows than the quarantine's budget.
    """
    if cfg.data.eval is None:
        return []
    samples = read_split(cfg.data.eval, prompt=cfg.data.prompt, limit=cfg.eval.samples, quarantine=quarantine)
    bare = next((sample.id for sample in samples if not sample.references), None)
    if bare is not None:
        raise DataError(f"{cfg.data.eval}: sample {bare!r} has no references to evaluate against")
    return samples


def trained_on(cfg: Config, samples: list[Sample], *, resume: bool = False) -> Iterator[Overlap]:
    """Held-out samples whose pictures the run trains on, for each place that it takes pictures from.

    A resumed run has copies of its pairs and rollouts, and needs neither the store nor the other run any more.

    Raises:
        DataError, RunError: such a place cannot be read.
    """
    if not samples:
        return
    if cfg.data.eval is not None and same_place(cfg.data.eval, cfg.data.train):
        ids = tuple(sample.id for sample in samples)
        yield Overlap("data.train, which data.eval is, too", len(ids), ids, len(ids), len(ids))
    else:
        yield overlap_with_data(samples, cfg.data.train)
    if cfg.data.preferences is not None and not resume:
        yield overlap_with_hashes(samples, trained_pictures(cfg.data.preferences), "data.preferences")
    if cfg.data.rollouts is not None and not resume:
        yield overlap_with_hashes(samples, logged_pictures(cfg.data.rollouts), "data.rollouts")


def with_opening(cfg: Config, model: ModelSection) -> Config:
    """The config with what the template of `model` writes before an answer, where a part of the reward needs it.

    Raises:
        ModelError: the model's config or processor cannot be used.
    """
    if not cfg.reward.needs_opening:
        return cfg
    from mmrl_ray.policy.load import load_skeleton
    from mmrl_ray.policy.tokens import answer_opening

    # The captions of a value-based run come from no template.
    opening = "" if cfg.agent is not None else answer_opening(load_skeleton(model).processor)
    return cfg.model_copy(update={"reward": cfg.reward.with_opening(opening)})


def check_model(cfg: Config) -> list[str]:
    """Model, processor, adapter targets and the first good training row's prompt; a small model is loaded and tried.

    Returns:
        what a user should know, a line each: the weights that the adapter leaves out.

    Raises:
        ModelError: the checkpoint, its processor or its chat template cannot be used.
        ConfigError: a setting of `model.processor` cannot.
        AdapterError: LoRA targets that match nothing, or more than the language model.
        ContextLengthError: prompt and longest completion do not fit the model.
        DataError: the training split cannot be used.
    """
    # Imported here, as below: drivers have other things checked here, and this where the model's half is.
    from mmrl_ray.policy.load import load_skeleton, try_quickly
    from mmrl_ray.policy.lora.targets import left_out_line, resolve_targets
    from mmrl_ray.policy.prompts import check_context, encode_prompts

    policy = load_skeleton(cfg.model)
    left_out = left_out_line(policy.hf_model, resolve_targets(policy.hf_model, cfg.model.lora))
    for prompt in encode_prompts(policy, [first_sample(cfg)]):
        check_context(policy, prompt, cfg.rollout.max_new_tokens)
    if cfg.teacher is not None:
        check_teacher(cfg.teacher, policy)
    try_quickly(cfg.model)
    return [left_out] if left_out is not None else []


def check_teacher(teacher: TeacherSection, student: Policy) -> Policy:
    """Whether there is such a teacher, and it reads the student's tokens; the teacher without its weights.

    Raises:
        ModelError: its checkpoint cannot be used, or has another vocabulary.
        AdapterError: its adapter is none.
    """
    from mmrl_ray.policy.load import load_skeleton
    from mmrl_ray.policy.lora.adapter import read_adapter_config
    from mmrl_ray.rollouts.teacher import refuse_other_tokens

    if teacher.adapter is not None:
        read_adapter_config(Path(teacher.adapter).expanduser())
    policy = load_skeleton(teacher.model)
    refuse_other_tokens(student, policy)
    return policy


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
    demands = placed_demands(cfg)
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
