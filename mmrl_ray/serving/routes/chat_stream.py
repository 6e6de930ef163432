"""A chat completion as server-sent events, in OpenAI's order.

    policy.stream: Served, Delta, Delta, … ──▶ head of the answer, a role for each choice, texts, finish reasons,
                                               usage if asked for, [DONE]

The head waits for `Served`: a request that is refused gets its own status, and the version is in a header.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, cast

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mmrl_ray.errors import ServingError
from mmrl_ray.serving.http_errors import CLIENT_GONE, about, error_body, is_expected
from mmrl_ray.serving.openai_answers import ChatChunk, ChoiceDelta, ChunkChoice, Logprobs, Usage
from mmrl_ray.serving.openai_types import ChatRequest
from mmrl_ray.serving.protocols import Delta, GenerateRequest, Served, ServedFinishReason
from mmrl_ray.serving.routes.documents import VERSION_HEADER
from mmrl_ray.serving.routes.tools import Tools
from mmrl_ray.serving.routes.work import for_client


class ChatStream(Response):
    """Sent as it is made; whatever ends it early frees the policy's rows."""

    media_type = "text/event-stream"

    def __init__(self, tools: Tools, asked: GenerateRequest, body: ChatRequest, deadline: float) -> None:
        """`deadline` is the request's, by `time.monotonic`."""
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._tools = tools
        self._asked = asked
        self._logprobs = bool(body.logprobs)
        self._usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        self._created = int(time.time())
        self._began = time.monotonic()
        self._deadline = deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        started = False
        try:
            async with for_client(receive, max(self._deadline - time.monotonic(), 0.0)):
                stream = self._tools.deps.policy.stream(self._asked)
                # An async generator, which is closed for its rows to go, also where a client leaves in the middle.
                async with aclosing(cast("AsyncGenerator[Served | Delta, None]", stream)) as items:
                    with about("messages"):
                        served = await anext(items, None)
                    if not isinstance(served, Served):
                        raise ServingError("the policy's stream did not begin with what serves it")
                    self.headers[VERSION_HEADER] = str(served.version)
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    started = True
                    async for chunk in self._chunks(served, items):
                        await _send_event(send, chunk.model_dump_json(exclude_unset=True))
                    await _send_event(send, "[DONE]", more=False)
        except Exception as error:
            if not started:
                raise
            if isinstance(error, HTTPException) and error.status_code == CLIENT_GONE:
                return
            await _send_event(send, error_body(error), more=False)
            if not is_expected(error):
                raise  # for the log: the answer is over

    async def _chunks(self, served: Served, items: AsyncIterator[Served | Delta]) -> AsyncIterator[ChatChunk]:
        written = 0
        for index in range(self._asked.n):
            yield self._chunk(served, index, ChoiceDelta(role="assistant", content=""))
        async for item in items:
            if not isinstance(item, Delta):
                raise ServingError("the policy's stream told twice what serves it")
            if not written and item.tokens:
                self._tools.metrics.first_token(time.monotonic() - self._began)
            written += len(item.tokens)
            if item.text or (self._logprobs and item.tokens):
                logprobs = Logprobs.of(item.tokens) if self._logprobs else None
                yield self._chunk(served, item.index, ChoiceDelta(content=item.text), logprobs=logprobs)
            if item.finish_reason is not None:
                yield self._chunk(served, item.index, ChoiceDelta(), finish_reason=item.finish_reason)
        self._tools.metrics.generated(served.prompt_tokens, written)
        if self._usage:
            yield self._event(served, choices=[], usage=Usage.of(served.prompt_tokens, written))

    def _chunk(
        self,
        served: Served,
        index: int,
        delta: ChoiceDelta,
        *,
        logprobs: Logprobs | None = None,
        finish_reason: ServedFinishReason | None = None,
    ) -> ChatChunk:
        choice = ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)
        # Every chunk of a stream that counts tokens has the key, and only its last one a value.
        return self._event(served, choices=[choice], **({"usage": None} if self._usage else {}))

    def _event(self, served: Served, **content: Any) -> ChatChunk:
        return ChatChunk(
            id=self._asked.id,
            object="chat.completion.chunk",
            created=self._created,
            model=served.model,
            system_fingerprint=f"{served.model}@{served.version}",
            **content,
        )


async def _send_event(send: Send, data: str, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": more})
