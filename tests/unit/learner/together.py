"""Several ranks in one process, each in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.errors import MMRLError
from mmrl_ray.learner.ranks import Ranks
from mmrl_ray.learner.step import LearnerStep
from mmrl_ray.policy.model import Policy
from tests.unit.learner.worlds import LENGTHS, make_groups, make_plan, payloads


class Together:
    """Ranks in threads: the collectives of a process group, without one."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=30)
        self.board: list[Any] = [None] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.board[rank] = value
        self.barrier.wait()
        everything = list(self.board)
        self.barrier.wait()
        return everything


class OneOf(Ranks):
    def __init__(self, together: Together, rank: int) -> None:
        super().__init__()
        self._group, self._rank = together, rank

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._group.size

    def sum_(self, values: torch.Tensor) -> None:
        values.copy_(torch.stack(self._group.exchange(self._rank, values.clone())).sum(dim=0))

    def max_(self, values: torch.Tensor) -> None:
        values.copy_(torch.stack(self._group.exchange(self._rank, values.clone())).amax(dim=0))

    def any(self, flag: bool) -> bool:
        return any(self._group.exchange(self._rank, flag))

    def raise_first(self, error: MMRLError | None) -> None:
        for found in self._group.exchange(self._rank, error):
            if found is not None:
                raise found


def run_together(
    make: Callable[[], Policy],
    cfg: LearnerSection,
    size: int,
    steps: int = 2,
    *,
    in_lockstep: bool = False,
    lengths: Sequence[Sequence[int]] = LENGTHS,
    **changes: Any,
) -> list[Any]:
    """[(policy, metrics of the last step) or the error] of each rank, which has the policy that `make` gives.

    `changes` are another `plan` for all steps, or other `payloads0`, `payloads1`, … for a rank.
    """
    together = Together(size)
    results: list[Any] = [None] * size
    policies: list[Policy] = [make() for _ in range(size)]
    groups = make_groups(policies[0], lengths=lengths)

    def work(rank: int) -> None:
        try:
            learner = LearnerStep(policies[rank], cfg, ranks=OneOf(together, rank), in_lockstep=in_lockstep)
            metrics: dict[str, Any] = {}
            for step in range(steps):
                plan = changes.get("plan") or make_plan(groups, cfg, step=step, world_size=size)
                metrics = learner.run(plan, changes.get(f"payloads{rank}", payloads))
            results[rank] = (policies[rank], metrics)
        except MMRLError as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return results
