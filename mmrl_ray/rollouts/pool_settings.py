"""The pool's numbers, apart from the pool, so that they can be read and tested without Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mmrl_ray.config import Config
from mmrl_ray.config.schema import Demand, demands_of
from mmrl_ray.telemetry.logs import LogFormat


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
