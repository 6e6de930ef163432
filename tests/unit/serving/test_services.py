"""The services over Serve handles while no replica runs yet."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.serve.exceptions import ReplicaUnavailableError

from mmrl_ray.errors import OverloadedError
from mmrl_ray.serving.services import ServedReward, ServePolicy

DEADLINE_S = 5.0


class Answer:
    """What `remote` gives back."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __await__(self) -> Any:
        if self._value is None:
            yield from asyncio.get_running_loop().create_future()  # as Serve's, until there is a replica
        return self._value

    def cancel(self) -> None:
        """Nothing to do."""


class Stream:
    """What `remote` gives back where a handle streams: the items, or an error in place of them."""

    def __init__(self, *items: Any) -> None:
        self._items = list(items)
        self.cancelled = False
        self.ended = False

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Any:
        if not self._items:
            self.ended = True
            raise StopAsyncIteration
        item = self._items.pop(0)
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self) -> None:
        self.cancelled = True


class StreamingHandle:
    """Of a deployment whose every method streams; one call after the other gives one of `streams`."""

    def __init__(self, *streams: Stream) -> None:
        self._streams = list(streams)

    def options(self, *, stream: bool, method_name: str) -> StreamingHandle:
        assert stream
        return self

    def __getattr__(self, name: str) -> Any:
        return None  # nothing is asked without a stream

    def remote(self, request: Any) -> Stream:
        return self._streams.pop(0)


class Handle:
    """Of a deployment whose first replica comes after `looks` looks."""

    def __init__(self, value: Any, looks: int | None) -> None:
        self._value, self._looks, self._looked = value, looks, 0

    def running_replicas_populated(self) -> bool:
        self._looked += 1
        return self._looks is not None and self._looked > self._looks

    def options(self, **kwargs: Any) -> Handle:
        return self

    def __getattr__(self, name: str) -> Any:
        return self

    def remote(self, *args: Any) -> Answer:
        return Answer(self._value if self._looks is not None else None)


async def within(awaitable: Any) -> Any:
    async with asyncio.timeout(DEADLINE_S):
        return await awaitable


@pytest.mark.parametrize("service", [ServePolicy, ServedReward])
@pytest.mark.parametrize(("looks", "expected"), [(None, False), (0, True), (3, True)])
def test_ready_does_not_wait_for_the_first_replica(service: Any, looks: int | None, expected: bool) -> None:
    assert asyncio.run(within(service(Handle(True, looks)).ready())) is expected


def test_models_are_refused_at_once_while_the_policy_starts() -> None:
    with pytest.raises(OverloadedError, match="policy deployment is starting"):
        asyncio.run(within(ServePolicy(Handle(["m"], None)).models()))
    assert asyncio.run(within(ServePolicy(Handle(["m"], 1)).models())) == ["m"]


def test_an_answer_is_a_stream_of_one_that_is_read_to_its_end() -> None:
    stream = Stream("answer")
    assert asyncio.run(within(ServePolicy(StreamingHandle(stream)).generate(object()))) == "answer"  # type: ignore[arg-type]
    assert stream.ended, "Serve takes the call for finished, and the replica for less busy, at the end of the stream"


def test_an_answer_of_a_lost_replica_is_asked_for_again() -> None:
    lost, other = Stream(ReplicaUnavailableError("policy")), Stream("answer")
    assert asyncio.run(within(ServePolicy(StreamingHandle(lost, other)).generate(object()))) == "answer"  # type: ignore[arg-type]
    assert lost.cancelled
