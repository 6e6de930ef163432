"""`Ranks`: the few things that learners of one group say to each other, in the process group that Ray Train made."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist

from mmrl_ray.errors import MMRLError

T = TypeVar("T")


class Ranks:
    """The learners of a group. Every method is a collective: all ranks call it, in the same order.

    Without a process group there is one rank, and nothing is sent. Waits end at the process group's time-out.
    """

    def __init__(self) -> None:
        self._together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    @property
    def rank(self) -> int:
        """This learner's place, from 0."""
        return dist.get_rank() if self._together else 0

    @property
    def size(self) -> int:
        """How many learners there are."""
        return dist.get_world_size() if self._together else 1

    def sum_(self, values: torch.Tensor) -> None:
        """Replaces `values` by their sum over all ranks."""
        if self._together:
            dist.all_reduce(values)

    def max_(self, values: torch.Tensor) -> None:
        """Replaces `values` by their largest over all ranks."""
        if self._together:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Whether it is true on some rank."""
        if not self._together:
            return flag
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        count = torch.tensor([float(flag)], device=device)
        self.sum_(count)
        return count.item() > 0

    def from_first(self, value: T | None) -> T:
        """What rank 0 gave; the others' values do not matter."""
        box = [value]
        if self._together:
            dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[return-value]

    def raise_first(self, error: MMRLError | None) -> None:
        """Raises, on every rank, the error of the lowest rank that has one."""
        errors: list[MMRLError | None] = [error]
        if self._together:
            errors = [None] * self.size
            dist.all_gather_object(errors, error)
        for found in errors:
            if found is not None:
                raise found
