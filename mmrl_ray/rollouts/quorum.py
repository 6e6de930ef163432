"""Whether enough rollout workers are ready, and since when not."""

from __future__ import annotations

from mmrl_ray.errors import RolloutError
from mmrl_ray.rollouts.pool_settings import PoolSettings


class Quorum:
    """Ends a run that has had too few workers for too long. Times are of the caller's clock, in seconds."""

    def __init__(self, settings: PoolSettings) -> None:
        self.complete = False
        """Whether the workers that the run began with were all ready once; nothing is too few before."""
        self._settings = settings
        self._below_since: float | None = None

    def look(self, ready: int, target: int, now: float, last_loss: str) -> None:
        """So many are ready at `now`, of `target` that there should be.

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
