"""Learners between a minimum and a maximum: what is kept from them, and a deadline while there is no room for any.

Ray Train makes the number of learners from what the nodes have in all, whoever uses it. So that it does not count on
the rollout workers' share, that share is registered where Ray Train registers its own (its autoscaling coordinator).
And with room for fewer than the minimum Ray Train waits without an end: here that wait has one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

import ray

from mmrl_ray.config import Config
from mmrl_ray.config.resources import ActorResources
from mmrl_ray.errors import PlacementError

logger = logging.getLogger(__name__)

Bundle = Mapping[str, float]

_RESERVED_FOR_S = 180.0
_RENEW_S = 20.0
_CALL_TIMEOUT_S = 5.0
_ROUNDING = 1e-6


def others(cfg: Config) -> list[Bundle]:
    """What the run's rollout workers and rewards ask Ray for, one bundle an actor."""
    bundles = [_bundle(cfg.resources.rollout)] * cfg.rollout.most_workers
    if cfg.reward.host == "serve":
        bundles.append(_bundle(cfg.resources.reward))
    return [bundle for bundle in bundles if bundle]


def learners_that_fit(nodes: Sequence[Bundle], taken: Sequence[Bundle], learner: Bundle, most: int) -> int:
    """How many learners nodes of these sizes hold beside `taken`, each of which goes to the first node it fits on."""
    if not learner:
        return most
    free = [dict(node) for node in nodes]
    for bundle in taken:
        home = next((node for node in free if _times(node, bundle) >= 1), None)
        if home is not None:
            home.update({name: home[name] - amount for name, amount in bundle.items()})
    return min(most, sum(_times(node, learner) for node in free))


class Room:
    """Watches over the room for the learners of one run. Call `check` every few seconds."""

    def __init__(self, cfg: Config, name: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._cfg = cfg
        self._name = f"mmrl-{name}-beside-learners"
        self._clock = clock
        self._since = clock()
        self._renewed = float("-inf")

    def check(self) -> None:
        """Renews the reservation of what is not the learners'.

        Raises:
            PlacementError: for `resources.placement_timeout_s` there has been room for fewer than the minimum.
        """
        now = self._clock()
        if now - self._renewed >= _RENEW_S:
            self._renewed = now
            _reserve(self._name, others(self._cfg))
        learner, share = self._cfg.learner, self._cfg.resources.learner
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        fit = learners_that_fit(nodes, others(self._cfg), _bundle(share), learner.max_workers)
        if fit >= learner.min_workers:
            self._since = now
        elif now - self._since >= self._cfg.resources.placement_timeout_s:
            raise PlacementError(
                f"{learner.min_workers} learners with {share.cpus:g} CPUs and {share.gpus:g} GPUs each, the least of "
                f"learner.workers, have had room for {fit} beside the rollout workers for "
                f"{self._cfg.resources.placement_timeout_s:g} s: lower learner.workers.min, resources or "
                "rollout.workers, or add nodes"
            )

    def close(self) -> None:
        """Gives the reservation back."""
        _reserve(self._name, [])


def _reserve(name: str, bundles: Sequence[Bundle]) -> None:
    """An empty list ends the reservation. That it fails is told, and no reason to end a run."""
    try:
        from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import ResourceRequestPriority
        from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
            get_or_create_autoscaling_coordinator,
        )
    except ImportError:
        logger.warning("this Ray has no coordinator to reserve with: learners may count on the rollout workers' share")
        return
    try:
        coordinator = get_or_create_autoscaling_coordinator()
        if bundles:
            answer = coordinator.request_resources.remote(
                requester_id=name,
                resources=[dict(bundle) for bundle in bundles],
                expire_after_s=_RESERVED_FOR_S,
                priority=ResourceRequestPriority.HIGH,
            )
        else:
            answer = coordinator.cancel_request.remote(requester_id=name)
        ray.get(answer, timeout=_CALL_TIMEOUT_S)
    except (ray.exceptions.RayError, TimeoutError) as error:
        logger.warning("the rollout workers' share was not reserved this time: %s", error)


def _bundle(share: ActorResources) -> Bundle:
    return {name: amount for name, amount in (("CPU", share.cpus), ("GPU", share.gpus)) if amount > 0}


def _times(node: Bundle, bundle: Bundle) -> int:
    return int(min((node.get(name, 0.0) + _ROUNDING) // amount for name, amount in bundle.items()))
