"""Clients that go away, or send slowly: their work ends, and others are served."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from mmrl_ray.config.serving import RateSection, ServingSection
from mmrl_ray.errors import MMRLError
from mmrl_ray.serving.app import GatewayDeps, make_app
from mmrl_ray.serving.routes.common import for_client
from tests.support.fake_services import BASE, FakePolicy, FakeReward, png, running_gateway, wait_until

DATA_URI = "data:image/png;base64," + base64.b64encode(png()).decode()
PART = {"type": "image_url", "image_url": {"url": DATA_URI}}
CHAT = {"model": BASE, "messages": [{"role": "user", "content": [PART]}]}
WORK: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/captions": {"image": DATA_URI},
    "/v1/rewards": {"captions": ["a"]},
    "/v1/score": {"queries": "a", "documents": "b"},
}


class Server:
    def __init__(self) -> None:
        self.policy, self.reward = FakePolicy(block=True), FakeReward(block=True)
        settings = ServingSection(rate=RateSection(concurrency=1), request_timeout_s=30.0)
        self.app = make_app(GatewayDeps(self.policy, self.reward, None, settings, insecure=True))
        self.url = ""

    @property
    def running(self) -> int:
        return self.policy.running + self.reward.running

    def connect(self) -> socket.socket:
        host, _, port = urlsplit(self.url).netloc.partition(":")
        return socket.create_connection((host, int(port)), timeout=10)

    def is_free(self) -> bool:
        """Whether the one request a client may have under way is not taken."""
        return httpx.get(f"{self.url}/version").status_code == 200


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    with running_gateway(server.app) as server.url:
        yield server


def request_bytes(path: str, body: bytes, *, length: int | None = None) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body) if length is None else length}\r\n\r\n".encode() + body


@pytest.mark.parametrize("path", list(WORK))
def test_a_client_that_goes_away_ends_its_work(server: Server, path: str) -> None:
    with server.connect() as connection:
        connection.sendall(request_bytes(path, json.dumps(WORK[path]).encode()))
        wait_until(lambda: server.running == 1)
        assert not server.is_free()
    wait_until(lambda: server.running == 0)
    wait_until(server.is_free)


def test_a_client_that_leaves_a_stream_ends_its_work(server: Server) -> None:
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json={**CHAT, "stream": True}) as response:
        assert response.status_code == 200
        lines = (line for line in response.iter_lines() if line)
        contents = [json.loads(next(lines).removeprefix("data: "))["choices"][0]["delta"] for _ in range(2)]
        assert contents == [{"role": "assistant", "content": ""}, {"content": "a"}], "it comes as it is made"
        assert server.policy.running == 1
        assert not server.is_free()
    wait_until(lambda: server.policy.running == 0)
    wait_until(server.is_free)


def test_a_client_that_leaves_in_the_middle_of_its_body_frees_its_place(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(request_bytes("/v1/captions", b'{"image":', length=1000))
        wait_until(lambda: not server.is_free())
    wait_until(server.is_free)
    assert server.policy.requests == []


def test_a_body_that_does_not_come_is_408() -> None:
    settings = ServingSection(request_timeout_s=0.1)
    app = make_app(GatewayDeps(FakePolicy(), None, None, settings, insecure=True))
    server = Server()
    with running_gateway(app) as server.url:
        for path in ("/v1/captions", "/v1/chat/completions"):
            with server.connect() as connection:
                connection.sendall(request_bytes(path, b'{"image":', length=1000))
                answer = connection.recv(65_536).decode()
                assert answer.startswith("HTTP/1.1 408")
        assert server.is_free()


def test_a_stream_whose_time_is_up_ends_with_an_error(server: Server) -> None:
    settings = ServingSection(request_timeout_s=0.2)
    app = make_app(GatewayDeps(server.policy, None, None, settings, insecure=True))
    with running_gateway(app) as url:
        text = httpx.post(f"{url}/v1/chat/completions", json={**CHAT, "stream": True}).text
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert "[DONE]" not in events
    assert json.loads(events[-1])["error"]["code"] == "timeout"
    wait_until(lambda: server.policy.running == 0)


def test_a_stream_that_cannot_be_sent_is_closed_at_once() -> None:
    """Not when somebody collects it: the policy's rows are taken until then."""
    policy, kept = FakePolicy(), []
    stream = policy.stream

    def keeping(request: Any) -> Any:
        kept.append(stream(request))
        return kept[-1]

    policy.stream = keeping  # type: ignore[method-assign]
    app = make_app(GatewayDeps(policy, None, None, ServingSection(), insecure=True))
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": headers}
    body = [{"type": "http.request", "body": json.dumps({**CHAT, "stream": True}).encode(), "more_body": False}]

    async def receive() -> Any:
        return body.pop() if body else await never()

    async def send(message: Any) -> None:
        if b" red" in message.get("body", b""):
            raise OSError("the connection broke")

    async def running_afterwards() -> int:
        with contextlib.suppress(OSError):
            await app(scope, receive, send)
        return policy.running  # asyncio.run itself closes generators later

    assert asyncio.run(running_afterwards()) == 0
    assert len(kept) == 1


# -- the helper alone --------------------------------------------------------------------------------------------------


async def never() -> Any:
    await asyncio.Event().wait()


async def gone() -> Any:
    return {"type": "http.disconnect"}


async def outcome(receive: Any, timeout_s: float, work: Any) -> Any:
    async with for_client(receive, timeout_s):
        return await work()


def test_work_that_ends_is_what_it_gives() -> None:
    async def quick() -> int:
        return 3

    async def fails() -> int:
        raise MMRLError("mine")

    assert asyncio.run(outcome(never, 5, quick)) == 3
    with pytest.raises(MMRLError, match="mine"):
        asyncio.run(outcome(never, 5, fails))


def test_gone_late_and_cancelled_are_told_apart() -> None:
    with pytest.raises(Exception, match="499"):
        asyncio.run(outcome(gone, 5, never))
    with pytest.raises(TimeoutError):
        asyncio.run(outcome(never, 0.01, never))

    async def cancelled() -> None:
        task = asyncio.create_task(outcome(never, 5, never))
        await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())


def test_nothing_is_left_running() -> None:
    async def quick() -> None:
        return None

    async def run() -> int:
        await outcome(never, 5, quick)
        await asyncio.sleep(0)
        return len(asyncio.all_tasks())

    assert asyncio.run(run()) == 1
