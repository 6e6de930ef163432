"""A policy and a reward that keep what they were asked, with knobs for delay, failure and endless work; a gateway."""

from __future__ import annotations

import asyncio
import contextlib
import io
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field

import uvicorn
from fastapi import FastAPI
from PIL import Image

from mmrl_ray.data.images import decode_image, image_hash
from mmrl_ray.errors import UnknownImageError, UnknownModelError
from mmrl_ray.experience.carriers import RewardBreakdown, RewardFailure, Score
from mmrl_ray.serving.protocols import (
    Choice,
    Delta,
    Generated,
    GenerateRequest,
    ModelInfo,
    RewardItem,
    Scored,
    Served,
    TokenInfo,
)

BASE, ADAPTER, ADAPTER_STEP = "tiny", "run-a", 40
WORDS = ("a", " red", " square", " on", " blue")
PROMPT_TOKENS = 7


@dataclass
class FakePolicy:
    """Each choice is its words with the sampling's numbers behind; `stop` cuts, `max_tokens` too."""

    delay_s: float = 0.0
    error: Exception | None = None
    fail_after: int | None = None
    """A stream fails after so many deltas."""
    block: bool = False
    """Never finishes; streams say their first word."""
    is_ready: bool = True
    running: int = 0
    """Requests under way."""
    requests: list[GenerateRequest] = field(default_factory=list)

    async def generate(self, request: GenerateRequest) -> Generated:
        with self._under_way(request):
            served = self._served(request)
            await self._work()
            if self.block:
                await asyncio.Event().wait()
            choices = tuple(Choice(i, *_finished(request, i)) for i in range(request.n))
            return Generated(served, choices)

    async def stream(self, request: GenerateRequest) -> AsyncIterator[Served | Delta]:
        with self._under_way(request):
            yield self._served(request)
            sent = 0
            for index in range(request.n):
                text, reason, tokens = _finished(request, index)
                for place, token in enumerate(tokens):
                    if sent == self.fail_after:
                        raise self.error or RuntimeError("secret of the server")
                    await self._work(streaming=True)
                    last = place == len(tokens) - 1
                    yield Delta(index, token.text, (token,), reason if last else None)
                    sent += 1
                    if self.block:
                        await asyncio.Event().wait()
                assert "".join(token.text for token in tokens) == text

    async def models(self) -> list[ModelInfo]:
        return [ModelInfo(BASE, 1_700_000_000, BASE, None, 0), ModelInfo(ADAPTER, 1_800_000_000, BASE, BASE, 40)]

    async def ready(self) -> bool:
        return self.is_ready

    @contextlib.contextmanager
    def _under_way(self, request: GenerateRequest) -> Iterator[None]:
        for image in request.images:  # the gateway leaves that to the policy
            decode_image(image)
        self.requests.append(request)
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    async def _work(self, *, streaming: bool = False) -> None:
        if self.error is not None and not (streaming and self.fail_after is not None):
            raise self.error
        if self.delay_s:
            await asyncio.sleep(self.delay_s)

    def _served(self, request: GenerateRequest) -> Served:
        if self.error is not None and self.fail_after is None:
            raise self.error
        versions = {BASE: 0, ADAPTER: ADAPTER_STEP}
        if request.model not in versions:
            raise UnknownModelError(f"no model {request.model!r} is served here")
        return Served(request.model, versions[request.model], PROMPT_TOKENS)


def _finished(request: GenerateRequest, index: int) -> tuple[str, str, tuple[TokenInfo, ...]]:
    """Text, finish reason and tokens of one choice."""
    words = [*WORDS, f" {index}"]
    reason = "stop"
    if len(words) > request.sampling.max_new_tokens:
        words, reason = words[: request.sampling.max_new_tokens], "length"
    for stop in request.sampling.stop:
        if any(stop in word for word in words):
            words = words[: next(i for i, word in enumerate(words) if stop in word)]
    tokens = tuple(TokenInfo(word, 10 + place, -0.5 * (place + 1)) for place, word in enumerate(words))
    return "".join(words), reason, tokens


@dataclass
class FakeReward:
    """A caption's total is its number of characters, less the number of references."""

    error: Exception | None = None
    block: bool = False
    is_ready: bool = True
    sigma: float | None = None
    running: int = 0
    items: list[tuple[RewardItem, ...]] = field(default_factory=list)
    known: set[str] = field(default_factory=set)
    failing: tuple[str, ...] = ()
    """Captions that cannot be scored."""

    async def score(self, items: tuple[RewardItem, ...]) -> Scored:
        self.items.append(items)
        self.running += 1
        try:
            if self.error is not None:
                raise self.error
            if self.block:
                await asyncio.Event().wait()
            hashes = tuple(self._hash(item) for item in items)
            scores = tuple(tuple(self._score(item, caption) for caption in item.captions) for item in items)
            return Scored(scores, reward="length", version="v1", image_hashes=hashes)
        finally:
            self.running -= 1

    async def describe(self) -> Mapping[str, str]:
        return {"reward": "length", "version": "v1"}

    async def ready(self) -> bool:
        return self.is_ready

    def _hash(self, item: RewardItem) -> str | None:
        if item.images:
            self.known.add(image_hash(item.images))
            return image_hash(item.images)
        if item.image_hash is not None and item.image_hash not in self.known:
            raise UnknownImageError("no picture of that hash is remembered: send the picture itself")
        return item.image_hash

    def _score(self, item: RewardItem, caption: str) -> Score:
        if caption in self.failing:
            return RewardFailure(f"no number for {caption}")
        parts = {"characters": float(len(caption)), "references": float(len(item.references))}
        weights = {"characters": 1.0, "references": -1.0}
        return RewardBreakdown(parts["characters"] - parts["references"], parts, weights, self.sigma)


@contextlib.contextmanager
def running_gateway(app: FastAPI) -> Iterator[str]:
    """URL of a real server on a free loopback port."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive())
    assert server.started
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()


def wait_until(condition: Callable[[], bool], deadline_s: float = 10.0) -> None:
    """Fails the test if `condition` does not hold in time."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come to hold in time"
        time.sleep(0.005)


def png(colour: tuple[int, int, int] = (200, 30, 30), size: int = 8) -> bytes:
    """A small picture."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, "PNG")
    return buffer.getvalue()
