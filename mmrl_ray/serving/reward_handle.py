"""The reward of a training run, behind its Serve deployment."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ray import serve

from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import MMRLError, RewardError
from mmrl_ray.experience.breakdown import Score
from mmrl_ray.rewards.checks import check_pairs
from mmrl_ray.serving.handle_errors import ATTEMPTS, FIRST_WAIT_S, project_error, replica_lost
from mmrl_ray.serving.names import REWARD
from mmrl_ray.serving.reward_service import CaptionBatch


class ServeReward:
    """A `RewardFn` that asks the reward deployment of a Serve application; picklable, so that workers hold it.

    A replica that dies is replaced by Serve, and the call goes to another one or waits for the next.
    """

    def __init__(self, app: str, *, timeout_s: float, images: bool = False) -> None:
        """Asks application `app`; gives up after `timeout_s`; sends pictures only with `images`."""
        self._app = app
        self._timeout_s = timeout_s
        self._images = images
        self._method: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (self._app, self._timeout_s, self._images)

    def score_batch(self, samples: Sequence[Sample], captions: Sequence[str]) -> list[Score]:
        """See `RewardFn`."""
        check_pairs(samples, captions)
        batch = CaptionBatch.of(samples, captions, images=self._images)
        deadline = time.monotonic() + self._timeout_s
        for attempt in range(ATTEMPTS):
            try:
                return self._call(batch, deadline - time.monotonic())
            except Exception as error:  # whatever Ray raises becomes the project's own
                wait_s = FIRST_WAIT_S * 2**attempt
                again = attempt + 1 < ATTEMPTS and time.monotonic() + wait_s < deadline
                if not (replica_lost(error) and again):
                    raise _reward_error(error, self._timeout_s) from error
                time.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")

    def close(self) -> None:
        """Ends the handle's thread, which would go on asking Serve for news. A later call makes a new one."""
        if self._method is not None:
            self._method.shutdown()
            self._method = None

    def _call(self, batch: CaptionBatch, timeout_s: float) -> list[Score]:
        if self._method is None:
            handle = serve.get_deployment_handle(REWARD, self._app)
            # Where Ray runs with the gateway's switches (`flags.py`) handles are for coroutines only; this is a thread.
            handle._init(_run_router_in_separate_loop=True)
            self._method = handle.score_batch
        response = self._method.remote(batch)
        try:
            return response.result(timeout_s=timeout_s)
        except TimeoutError:
            response.cancel()
            raise


def _remake(app: str, timeout_s: float, images: bool) -> ServeReward:
    return ServeReward(app, timeout_s=timeout_s, images=images)


def _reward_error(error: Exception, timeout_s: float) -> MMRLError:
    if isinstance(error, TimeoutError):
        return RewardError(f"the reward deployment did not answer within {timeout_s:g} s; raise reward.timeout_s")
    found = project_error(error, "reward")
    return found if isinstance(found, RewardError) else RewardError(str(found))
