"""Calls through Serve handles: policy and reward for the gateway, the reward of a run, and their errors as ours."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError

from mmrl_ray.config.serving import POLICY, REWARD
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import MMRLError, OverloadedError, RewardError, ServingError, said
from mmrl_ray.experience.carriers import Score
from mmrl_ray.rewards.base import check_pairs
from mmrl_ray.serving.protocols import Delta, Generated, GenerateRequest, ModelInfo, RewardItem, Scored, Served
from mmrl_ray.serving.reward_service import CaptionBatch

_SHORTLY_S = 0.5
"""How long a gateway that is new itself may take to hear of replicas that run."""
_LOOK_S = 0.02
ATTEMPTS = 4
"""Of a call whose replica was lost, the first included. What the replicas do has no side effects, and sampling is
seeded, so that a second try gives what the first would have given."""
FIRST_WAIT_S = 0.2
"""Before the second attempt; it doubles. With no replica left the handle itself waits for the next one."""


class ServePolicy:
    """`PolicyService` over the handle of the policy deployment."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        # Streamed, though it is one item: with a unary call over gRPC Serve learns only at the call's end how busy the
        # replica was at its beginning, takes that for how busy it is, and sends everything to one replica at a time.
        self._generate = handle.options(method_name="generate", stream=True)
        self._stream = handle.options(method_name="stream", stream=True)
        self._models = handle.models
        self._ready = handle.ready

    async def generate(self, request: GenerateRequest) -> Generated:
        """All choices, finished. Cancelling the call frees its rows."""
        return await _call(POLICY, self._generate.remote, request, streamed=True)

    async def stream(self, request: GenerateRequest) -> AsyncIterator[Served | Delta]:
        """`Served`, then deltas. Goes to another replica only while nothing has come yet."""
        for attempt in range(ATTEMPTS):
            response = self._stream.remote(request)
            began = False
            try:
                async for item in response:
                    began = True
                    yield item
                return
            except (asyncio.CancelledError, Exception) as error:
                found = _not_ours(error, POLICY)
                if began and replica_lost(found):
                    raise ServingError("the replica that streamed this answer was lost: ask again") from error
                await _wait_or_raise(found, POLICY, attempt)
            finally:
                response.cancel()  # a finished one takes no notice

    async def models(self) -> list[ModelInfo]:
        """The base first, then adapters by id.

        Raises:
            OverloadedError: no replica has started yet; unlike for a caption, nobody waits for one.
        """
        if not await _has_started(self._handle):
            raise OverloadedError(f"the {POLICY} deployment is starting: try again later")
        return await _call(POLICY, self._models.remote)

    async def ready(self) -> bool:
        """Whether a replica has its model loaded and warmed up."""
        return await _has_started(self._handle) and await _call(POLICY, self._ready.remote)


class ServedReward:
    """`RewardService` over the handle of the reward deployment."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._score = handle.score
        self._describe = handle.describe
        self._ready = handle.ready

    async def score(self, items: tuple[RewardItem, ...]) -> Scored:
        """One score a caption, in order."""
        return await _call(REWARD, self._score.remote, items)

    async def describe(self) -> Mapping[str, str]:
        """The reward's name and version."""
        return await _call(REWARD, self._describe.remote)

    async def ready(self) -> bool:
        """Whether a replica of the reward answers."""
        return await _has_started(self._handle) and await _call(REWARD, self._ready.remote)


async def _has_started(handle: Any) -> bool:
    """Whether there has been a replica; a call would wait for the first one until its deadline."""
    deadline = time.monotonic() + _SHORTLY_S
    while not (started := handle.running_replicas_populated()) and time.monotonic() < deadline:
        await asyncio.sleep(_LOOK_S)
    return bool(started)


async def _call(who: str, remote: Callable[..., Any], *arguments: Any, streamed: bool = False) -> Any:
    """One call, again where its replica was lost; cancelling it cancels the replica's work."""
    for attempt in range(ATTEMPTS):
        response = remote(*arguments)
        try:
            if not streamed:
                return await response
            # Read to its end, or Serve would count the call as under way for ever.
            [item] = [item async for item in response]
            return item
        except (asyncio.CancelledError, Exception) as error:  # noqa: BLE001 - becomes the project's own
            response.cancel()
            await _wait_or_raise(_not_ours(error, who), who, attempt)
    raise AssertionError("the last attempt returns or raises")


def _not_ours(error: BaseException, who: str) -> Exception:
    """An error to deal with; raises the cancellation of this very task.

    Serve also reports as cancelled what a replica let go of as it ended, with nobody here having cancelled anything.
    """
    if not isinstance(error, asyncio.CancelledError):
        assert isinstance(error, Exception)
        return error
    task = asyncio.current_task()
    if task is None or task.cancelling():
        raise error
    return ReplicaUnavailableError(who)


async def _wait_or_raise(error: Exception, who: str, attempt: int) -> None:
    """Before another attempt, if another replica may do better."""
    if not replica_lost(error) or attempt + 1 == ATTEMPTS:
        raise project_error(error, who) from error
    await asyncio.sleep(FIRST_WAIT_S * 2**attempt)


def replica_lost(error: BaseException) -> bool:
    """Whether the replica went away, rather than answered."""
    return isinstance(_cause(error), RayActorError | WorkerCrashedError | ReplicaUnavailableError)


def project_error(error: Exception, who: str) -> MMRLError:
    """The error to raise in place of `error`; `who` names the deployment."""
    cause = _cause(error)
    if isinstance(cause, MMRLError):
        return cause
    if isinstance(cause, BackPressureError):
        return OverloadedError(f"the {who} deployment has as many waiting requests as it takes: try again later")
    if replica_lost(cause):
        return OverloadedError(f"a replica of the {who} deployment was lost, another is starting: try again later")
    return ServingError(f"the {who} deployment failed: {type(cause).__name__}: {said(cause)}")


def _cause(error: BaseException) -> BaseException:
    """What was raised in the replica."""
    return error.cause if isinstance(error, RayTaskError) else error


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
        return partial(ServeReward, timeout_s=self._timeout_s, images=self._images), (self._app,)

    def score_batch(self, samples: Sequence[Sample], captions: Sequence[str]) -> list[Score]:
        """One score a caption (`RewardFn`), from the deployment."""
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
            # Where Ray runs with the gateway's switches (`haproxy.py`) handles are for coroutines only; this is a
            # thread.
            handle._init(_run_router_in_separate_loop=True)
            self._method = handle.score_batch
        response = self._method.remote(batch)
        try:
            return response.result(timeout_s=timeout_s)
        except TimeoutError:
            response.cancel()
            raise


def _reward_error(error: Exception, timeout_s: float) -> MMRLError:
    if isinstance(error, TimeoutError):
        return RewardError(f"the reward deployment did not answer within {timeout_s:g} s; raise reward.timeout_s")
    found = project_error(error, "reward")
    return found if isinstance(found, RewardError) else RewardError(str(found))
