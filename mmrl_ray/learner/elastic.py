"""Learners between a minimum and a maximum: what is kept from them, and a deadline while there is no room for any.

Ray Train makes the number of learners from what the nodes have in all, whoever uses it. So that it does not count on
the rollout workers' share, that share is registered where Ray Train registers its own (`rollouts/nodes.py`).
And with room for fewer than the minimum Ray Train waits without an end: here that wait has one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

import ray

from mmrl_ray.config import Config
from mmrl_ray.config.demands import Demand, demands_of
from mmrl_ray.errors import PlacementError
from mmrl_ray.rollouts.nodes import register

logger = logging.getLogger(__name__)

Bundle = Mapping[str, float]

_CALL_TIMEOUT_S = 5.0
_ROUNDING = 1e-6


def others(cfg: Config) -> list[Demand]:
    """What the run asks Ray for beside its learners, at most."""
    return [demand for demand in demands_of(cfg, at_most=True) if demand.kind != "learner"]


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

    def __init__(self, cfg: Config, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._cfg = cfg
        self._clock = clock
        self._since = clock()

    def reserve(self) -> None:
        """Registers what is not the learners', before Ray Train counts; the rollout controller keeps it registered.

        That it fails is told, and no reason to end a run.
        """
        try:
            ray.get(register(self._cfg.run.name, others(self._cfg)), timeout=_CALL_TIMEOUT_S)
        except ImportError:
            logger.warning("this Ray has no coordinator to reserve with: learners may count on the workers' share")
        except (ray.exceptions.RayError, RuntimeError, OSError) as error:
            logger.warning("the rollout workers' share was not reserved: %s", error)

    def check(self) -> None:
        """Looks at what there is now.

        Raises:
            PlacementError: for `resources.placement_timeout_s` there has been room for fewer than the minimum.
        """
        now = self._clock()
        learner, share = self._cfg.learner, self._cfg.resources.learner
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        taken = [demand.bundle for demand in others(self._cfg) if demand.bundle for _ in range(demand.count)]
        mine = {name: amount for name, amount in (("CPU", share.cpus), ("GPU", share.gpus)) if amount}
        fit = learners_that_fit(nodes, taken, mine, learner.max_workers)
        if fit >= learner.min_workers:
            self._since = now
        elif now - self._since >= self._cfg.resources.placement_timeout_s:
            raise PlacementError(
                f"{learner.min_workers} learners with {share.cpus:g} CPUs and {share.gpus:g} GPUs each, the least of "
                f"learner.workers, have had room for {fit} beside the rollout workers for "
                f"{self._cfg.resources.placement_timeout_s:g} s: lower learner.workers.min, resources or "
                "rollout.workers, or add nodes"
            )


def _times(node: Bundle, bundle: Bundle) -> int:
    return int(min((node.get(name, 0.0) + _ROUNDING) // amount for name, amount in bundle.items()))
