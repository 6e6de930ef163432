"""What a pool of rollout workers asks of its cluster: how many, what each needs, every deadline, and nodes for them.

There is one wish for nodes in the whole cluster, and Ray Train's coordinator writes it every few seconds, out of what
everybody has registered with it: each group of learners is, by Ray Train itself. A wish written beside it would be gone
a moment later, and the learners' with it before that. So the run's other actors are registered there, under a name of
the run, for some minutes at a time.

Where learners and rollout workers share GPUs, a placement group holds one bundle a GPU, with room for one learner and
the workers beside it. Actors that ask for fractions one by one could take what a learner needs: two workers of 0.49 go
to one GPU, and two learners of 0.51 find room on the other for one of them.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from mmrl_ray.config import Config
from mmrl_ray.config.schema import Demand, demands_of
from mmrl_ray.errors import ConfigError, PlacementError, RolloutError
from mmrl_ray.telemetry.logs import LogFormat

_LOOK_EVERY_S = 2.0
_RENEW_S = 20.0
_REGISTERED_FOR_S = 180.0
_ANSWER_S = 5.0
_COORDINATOR = "AutoscalingCoordinator"
"""Its name and its namespace."""
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class SharedGpu:
    """One learner and the rollout workers beside it, on one GPU."""

    workers: int
    cpus: float
    """Of all of them together, as `gpus`."""
    gpus: float


def shared_gpus_of(cfg: Config) -> tuple[SharedGpu, ...]:
    """One for each learner of a run whose learners and rollout workers share GPUs; none of any other.

    The workers that the run begins with are dealt out evenly, as many as fit beside a learner; what is left of them has
    a place of its own.

    Raises:
        ConfigError: learners whose number is a range are to share.
    """
    learner, rollout, count = cfg.resources.learner, cfg.resources.rollout, cfg.learner.workers
    if not cfg.resources.takes_turns or cfg.agent is not None:
        return ()
    if not isinstance(count, int):
        raise ConfigError(
            f"learner.workers={{min: {count.min}, max: {count.max}}} on shared GPUs: which of them are kept for a "
            "learner is settled when a run starts, and Ray Train looks for room for a range again and again, where "
            "rollout workers may have taken it; write learner.workers as one number, or resources.placement: split "
            "with whole GPUs"
        )
    if learner.node_labels != rollout.node_labels:
        return ()
    fitting, left, found = int((1 - learner.gpus + _ROUNDING) / rollout.gpus), cfg.rollout.first_workers, []
    for place in range(count):
        workers = min(fitting, math.ceil(left / (count - place)))
        left -= workers
        cpus, gpus = learner.cpus + workers * rollout.cpus, round(learner.gpus + workers * rollout.gpus, 4)
        found.append(SharedGpu(workers, cpus, gpus))
    return tuple(found)


def placed_demands(cfg: Config) -> list[Demand]:
    """`demands_of`, as it is placed: who shares a GPU is one; raises as `shared_gpus_of`."""
    demands, shared = demands_of(cfg), shared_gpus_of(cfg)
    found = []
    for gpu in dict.fromkeys(shared):
        keys = ("learner.workers", "resources.learner and resources.rollout")
        kind = f"learner with {gpu.workers} rollout" if gpu.workers else "learner"
        found.append(Demand(kind, shared.count(gpu), gpu.cpus, gpu.gpus, *keys, cfg.resources.learner.node_labels))
    beside = sum(gpu.workers for gpu in shared)
    for demand in demands:
        if demand.kind == "rollout" and demand.count > beside:
            found.append(replace(demand, count=demand.count - beside))
        elif demand.kind != "rollout" and not (shared and demand.kind == "learner"):
            found.append(demand)
    return found


@contextlib.contextmanager
def shared_gpus(cfg: Config) -> Iterator[PlacementGroup | None]:
    """The bundles of `shared_gpus_of`, placed, while the block lasts; None where there are none.

    Raises:
        ConfigError: as `shared_gpus_of`.
        PlacementError: there was no room for them within `resources.placement_timeout_s`.
    """
    gpus, labels = shared_gpus_of(cfg), dict(cfg.resources.learner.node_labels)
    if not gpus:
        yield None
        return
    bundles = [{name: amount for name, amount in (("CPU", g.cpus), ("GPU", g.gpus)) if amount} for g in gpus]
    group = placement_group(bundles, bundle_label_selector=[labels] * len(gpus) if labels else None)
    try:
        limit = cfg.resources.placement_timeout_s
        deadline = time.monotonic() + limit
        while not group.wait(min(1.0, limit)):
            if time.monotonic() >= deadline:
                total = {k: v for k, v in ray.cluster_resources().items() if k in ("CPU", "GPU")}
                raise PlacementError(
                    f"{len(gpus)} learners with their rollout workers on a GPU each were not placed within {limit:g} "
                    f"s: one asks for {demand_of(gpus[0].cpus, gpus[0].gpus, labels)}, the cluster has {total} in all; "
                    "lower learner.workers, resources.learner or resources.rollout, or add nodes"
                )
        yield group
    finally:
        remove_placement_group(group)


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """How many workers, what each asks of Ray, and every deadline, in seconds."""

    workers: int
    min_workers: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    node_labels: Mapping[str, str] = field(default_factory=dict)
    """A node without them takes no worker."""
    placement_timeout_s: float = 300.0
    """From asking Ray for a worker to its first answer, and again until its engine is built."""
    assignment_timeout_s: float = 300.0
    worker_deadline_s: float = 60.0
    """Fewer than `min_workers` ready for so long ends the run."""
    probe_every_s: float = 2.0
    probe_timeout_s: float = 30.0
    max_start_failures: int = 3
    """In a row, without any worker becoming ready in between; then the run ends, unless it has workers enough."""
    beside: tuple[Demand, ...] = ()
    """Of the run's other actors but the learners, which nodes have to hold, too."""
    learners_grow: bool = False
    """Whether Ray Train makes as many learners as there is room for: it is then told what is not theirs."""
    most_workers: int = 1
    """As many as the run may make by itself."""
    retry_start_s: float = 0.5
    """After a worker that died before it was ready; doubles with each one in a row."""
    log_format: LogFormat = "text"
    """Of the workers' log lines."""
    model: str = ""
    """Path of the run's model, for the error of workers that it ends."""
    prepares_ahead: bool = False
    """Whether workers make prompts beside their model: they are told of what comes next."""
    bundles: PlacementGroup | None = None
    """One for each GPU that is shared with a learner."""
    in_bundles: tuple[int, ...] = ()
    """How many workers each has room for; others go wherever there is some."""

    @property
    def demand(self) -> str:
        """What one worker asks for, in Ray's words."""
        return demand_of(self.cpus, self.gpus, self.node_labels)

    @property
    def actor_options(self) -> dict[str, Any]:
        """The same as options of a Ray actor."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "label_selector": dict(self.node_labels) or None}

    def options_in(self, bundle: int | None) -> dict[str, Any]:
        """`actor_options` in a bundle of that number, or anywhere."""
        if bundle is None or self.bundles is None:
            return self.actor_options
        place = PlacementGroupSchedulingStrategy(self.bundles, placement_group_bundle_index=bundle)
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "scheduling_strategy": place}

    def free_bundle(self, taken: Sequence[int | None]) -> int | None:
        """The bundle for one more worker beside those in `taken`: the emptiest that has room, if there is one."""
        used = [taken.count(bundle) for bundle in range(len(self.in_bundles))]
        open_ = [bundle for bundle, most in enumerate(self.in_bundles) if used[bundle] < most]
        return min(open_, key=used.__getitem__, default=None)

    def demands(self, workers: int) -> list[Demand]:
        """What the run's actors ask for with so many workers, without its learners, who ask for themselves.

        Learners that take what room there is must leave the workers' that may yet come.
        """
        count = max(workers, self.most_workers) if self.learners_grow else workers
        keys = ("rollout.workers", "resources.rollout")
        return [Demand("rollout", count, self.cpus, self.gpus, *keys, self.node_labels), *self.beside]

    @classmethod
    def of(cls, cfg: Config, bundles: PlacementGroup | None = None) -> PoolSettings:
        """A run's settings, with what `shared_gpus` gave."""
        return cls(
            bundles=bundles,
            in_bundles=tuple(gpu.workers for gpu in shared_gpus_of(cfg)) if bundles is not None else (),
            workers=cfg.rollout.first_workers,
            min_workers=cfg.rollout.min_workers,
            cpus=cfg.resources.rollout.cpus,
            gpus=cfg.resources.rollout.gpus,
            node_labels=cfg.resources.rollout.node_labels,
            placement_timeout_s=cfg.resources.placement_timeout_s,
            assignment_timeout_s=cfg.rollout.assignment_timeout_s,
            # A worker that takes the place of another has an engine to start first.
            worker_deadline_s=cfg.rollout.worker_deadline_s
            + (cfg.rollout.engine.start_timeout_s if cfg.rollout.engine.kind == "vllm" else 0.0),
            log_format=cfg.run.log_format,
            prepares_ahead=cfg.resources.rollout.prompt_processes > 0,
            model=cfg.model.path,
            beside=tuple(demand for demand in demands_of(cfg) if demand.kind not in ("learner", "rollout")),
            learners_grow=not isinstance(cfg.learner.workers, int),
            most_workers=cfg.rollout.most_workers,
        )


def demand_of(cpus: float, gpus: float, node_labels: Mapping[str, str] | None = None) -> str:
    """What one actor asks for, in Ray's words."""
    amounts = "{" + ", ".join(f"{k}: {v:g}" for k, v in (("CPU", cpus), ("GPU", gpus)) if v) + "}"
    labels = ", ".join(f"{key}={value}" for key, value in (node_labels or {}).items())
    return f"{amounts} on a node labelled {labels}" if labels else amounts


class Quorum:
    """Ends a run that has had too few workers for too long. Times are of the caller's clock, in seconds."""

    def __init__(self, settings: PoolSettings) -> None:
        self.complete = False
        """Whether the workers that the run began with were all ready once; nothing is too few before."""
        self._settings = settings
        self._below_since: float | None = None

    def look(self, ready: int, target: int, now: float, last_loss: str) -> None:
        """Takes in how many workers are ready at `now`, of `target` that there should be.

        Raises:
            RolloutError: fewer than `min_workers` for longer than `worker_deadline_s`.
        """
        minimum, limit = self._settings.min_workers, self._settings.worker_deadline_s
        self.complete = self.complete or ready >= min(self._settings.workers, target)
        if ready >= minimum or not self.complete:
            self._below_since = None
        elif self._below_since is None:
            self._below_since = now
        elif now - self._below_since > limit:
            raise RolloutError(
                f"{ready} of at least {minimum} rollout workers were ready for {limit:g} s; "
                f"last loss: {last_loss or 'none'}; a new one asks for {self._settings.demand}"
            )


def register(run: str, demands: Sequence[Demand]) -> Any:
    """Has Ray's autoscaler make room for these actors of a run, and Ray Train not count on it; renew it.

    Replaces what was registered for the run before; with no demands, that is taken back. Returns a reference to the
    answer, which holds nothing.

    Raises:
        RayError, RuntimeError, OSError, ImportError: this Ray does not answer, or has no such coordinator.
    """
    # Imported here: it takes a second, which a run that keeps its size need not pay.
    from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import ResourceRequestPriority
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    coordinator, name = get_or_create_autoscaling_coordinator(), f"mmrl-{run}-beside-learners"
    actors = [demand for demand in demands if demand.bundle for _ in range(demand.count)]
    if not actors:
        return coordinator.cancel_request.remote(requester_id=name)
    return coordinator.request_resources.remote(
        requester_id=name,
        resources=[demand.bundle for demand in actors],
        label_selectors=[dict(demand.labels) for demand in actors],
        expire_after_s=_REGISTERED_FOR_S,
        priority=ResourceRequestPriority.HIGH,
    )


def find_coordinator() -> Any:
    """The cluster's coordinator, or None where nobody has needed one yet."""
    try:
        return ray.get_actor(_COORDINATOR, namespace=_COORDINATOR)
    except ValueError:
        return None


def end_coordinator() -> None:
    """Ends the coordinator unless somebody has something registered with it. Ray Train makes one, and leaves it."""
    with contextlib.suppress(RayError, RuntimeError, OSError):  # it is gone, or does not answer: Ray's affair
        coordinator = find_coordinator()
        if coordinator is not None and ray.get(coordinator.__ray_call__.remote(_is_idle), timeout=_ANSWER_S):
            ray.kill(coordinator, no_restart=True)


def _is_idle(coordinator: Any) -> bool:
    """In the coordinator's process. One of a Ray that keeps its book otherwise is left alone."""
    requests = getattr(coordinator, "_ongoing_reqs", None)
    return requests is not None and all(request.expiration_time < time.time() for request in requests.values())


class Nodes:
    """One run's wishes about its cluster."""

    def __init__(self, run: str, settings: PoolSettings, clock: Callable[[], float]) -> None:
        self.free: dict[str, float] | None = None
        """CPUs and GPUs that were free at the last `look`; None while nothing waits for them."""
        self._run = run
        self._settings = settings
        self._clock = clock
        # A run that keeps its size needs no registration: actors that wait are demand enough. Unless Ray Train could
        # take the room in the meantime.
        self._registers = settings.learners_grow
        self._asked_for = settings.workers
        self._asked = float("-inf")
        self._answer: Any = None
        self._problem = ""
        self._looked = float("-inf")

    def ask_for(self, workers: int) -> list[dict[str, Any]]:
        """Keeps registered what the run's actors ask for with so many workers, once there are to be more or fewer.

        A cluster without an autoscaler takes the wish and does nothing about it.

        Returns events for the run's log.
        """
        self._registers = self._registers or workers != self._settings.workers
        now = self._clock()
        if not self._registers or (workers == self._asked_for and now - self._asked < _RENEW_S):
            return []
        self._asked_for, self._asked = workers, now
        try:
            if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
                ray.get(self._answer)  # of the time before
            self._answer = register(self._run, self._settings.demands(workers))
        except (RayError, RuntimeError, OSError, ImportError) as error:  # no reason to end a run: its workers wait
            self._answer, told, self._problem = None, self._problem, f"{type(error).__name__}: {error}"
            return [{"kind": "nodes_not_asked_for", "detail": self._problem}] if self._problem != told else []
        self._problem = ""
        return []

    def look(self, waiting_s: float) -> None:
        """Finds out what is free, now and then while a worker has waited for it for more than a moment."""
        now = self._clock()
        if waiting_s < _LOOK_EVERY_S:
            self.free = None
        elif now - self._looked > _LOOK_EVERY_S:
            self._looked = now
            self.free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}

    def close(self) -> None:
        """Nodes are not kept for this run any more."""
        if self._registers:
            with contextlib.suppress(RayError, RuntimeError, OSError, ImportError):  # it expires by itself, too
                ray.get(register(self._run, []), timeout=_ANSWER_S)
