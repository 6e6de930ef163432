"""Nodes for the workers of a run: what Ray's autoscaler is asked for, and what the cluster has free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError

from mmrl_ray.rollouts.pool_settings import PoolSettings

_LOOK_EVERY_S = 2.0


class Nodes:
    """One run's wishes about its cluster."""

    def __init__(self, settings: PoolSettings, clock: Callable[[], float]) -> None:
        self.free: dict[str, float] | None = None
        """CPUs and GPUs that were free at the last `look`; None while nothing waits for them."""
        self._settings = settings
        self._clock = clock
        self._asked_for = settings.workers
        self._looked = float("-inf")

    def ask_for(self, workers: int) -> list[dict[str, Any]]:
        """Has the autoscaler make room for all of the run's actors, when there are to be more or fewer of them.

        A cluster without an autoscaler takes the wish and does nothing about it. There is one wish for the whole
        cluster: of two runs that scale there the last one's counts, and the other's workers wait in Ray's own queue.

        Returns events for the run's log.
        """
        if workers == self._asked_for:
            return []
        self._asked_for = workers
        return self._wish(self._settings.bundles(workers))

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
        if self._asked_for != self._settings.workers:
            self._wish([])

    def _wish(self, bundles: list[dict[str, float]]) -> list[dict[str, Any]]:
        wish: list[dict[str, Any]] = [dict(bundle) for bundle in bundles]
        try:
            request_resources(bundles=wish)
        except (RayError, RuntimeError, OSError) as error:  # no reason to end a run: its workers wait for room
            return [{"kind": "nodes_not_asked_for", "detail": f"{type(error).__name__}: {error}"}]
        return []
