"""Policy and reward as the gateway sees them, over Serve handles."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from ray.serve.exceptions import ReplicaUnavailableError

from mmrl_ray.errors import OverloadedError, ServingError
from mmrl_ray.serving.handle_errors import ATTEMPTS, FIRST_WAIT_S, project_error, replica_lost
from mmrl_ray.serving.names import POLICY, REWARD
from mmrl_ray.serving.protocols import (
    Delta,
    Generated,
    GenerateRequest,
    ModelInfo,
    RewardItem,
    Scored,
    Served,
)

_SHORTLY_S = 0.5
"""How long a gateway that is new itself may take to hear of replicas that run."""
_LOOK_S = 0.02


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
        """See `PolicyService`."""
        return await _call(POLICY, self._generate.remote, request, streamed=True)

    async def stream(self, request: GenerateRequest) -> AsyncIterator[Served | Delta]:
        """See `PolicyService`. Goes to another replica only while nothing has come yet."""
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
        """See `PolicyService`.

        Raises:
            OverloadedError: no replica has started yet; unlike for a caption, nobody waits for one.
        """
        if not await _has_started(self._handle):
            raise OverloadedError(f"the {POLICY} deployment is starting: try again later")
        return await _call(POLICY, self._models.remote)

    async def ready(self) -> bool:
        """See `PolicyService`."""
        return await _has_started(self._handle) and await _call(POLICY, self._ready.remote)


class ServedReward:
    """`RewardService` over the handle of the reward deployment."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._score = handle.score
        self._describe = handle.describe
        self._ready = handle.ready

    async def score(self, items: tuple[RewardItem, ...]) -> Scored:
        """See `RewardService`."""
        return await _call(REWARD, self._score.remote, items)

    async def describe(self) -> Mapping[str, str]:
        """See `RewardService`."""
        return await _call(REWARD, self._describe.remote)

    async def ready(self) -> bool:
        """See `RewardService`."""
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
            return await (_only_item(response) if streamed else response)
        except (asyncio.CancelledError, Exception) as error:  # noqa: BLE001 - becomes the project's own
            response.cancel()
            await _wait_or_raise(_not_ours(error, who), who, attempt)
    raise AssertionError("the last attempt returns or raises")


async def _only_item(response: AsyncIterator[Any]) -> Any:
    """Of a stream; it is read to its end, or Serve would count the call as under way for ever."""
    [item] = [item async for item in response]
    return item


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
