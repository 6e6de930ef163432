"""What a pool of rollout workers asks of its cluster: how many, what each needs, every deadline, and nodes for them.

There is one wish for nodes in the whole cluster, and Ray Train's coordinator writes it every few seconds, out of what
everybody has registered with it: each group of learners is, by Ray Train itself. A wish written beside it would be gone
a moment later, and the learners' with it before that. So the run's other actors are registered there, under a name of
the run, for some minutes at a time.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from mmrl_ray.config import Config
from mmrl_ray.config.schema import Demand, demands_of
from mmrl_ray.errors import RolloutError
from mmrl_ray.telemetry.logs import LogFormat

_LOOK_EVERY_S = 2.0
_RENEW_S = 20.0
_REGISTERED_FOR_S = 180.0
_ANSWER_S = 5.0
_COORDINATOR = "AutoscalingCoordinator"
"""Its name and its namespace."""


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

    @property
    def demand(self) -> str:
        """What one worker asks for, in Ray's words."""
        return demand_of(self.cpus, self.gpus, self.node_labels)

    @property
    def actor_options(self) -> dict[str, Any]:
        """The same as options of a Ray actor."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "label_selector": dict(self.node_labels) or None}

    def demands(self, workers: int) -> list[Demand]:
        """What the run's actors ask for with so many workers, without its learners, who ask for themselves.

        Learners that take what room there is must leave the workers' that may yet come.
        """
        count = max(workers, self.most_workers) if self.learners_grow else workers
        keys = ("rollout.workers", "resources.rollout")
        return [Demand("rollout", count, self.cpus, self.gpus, *keys, self.node_labels), *self.beside]

    @classmethod
    def of(cls, cfg: Config) -> PoolSettings:
        """A run's settings."""
        return cls(
            workers=cfg.rollout.first_workers,
            min_workers=cfg.rollout.min_workers,
            cpus=cfg.resources.rollout.cpus,
            gpus=cfg.resources.rollout.gpus,
            node_labels=cfg.resources.rollout.node_labels,
            placement_timeout_s=cfg.resources.placement_timeout_s,
            assignment_timeout_s=cfg.rollout.assignment_timeout_s,
            worker_deadline_s=cfg.rollout.worker_deadline_s,
            log_format=cfg.run.log_format,
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
