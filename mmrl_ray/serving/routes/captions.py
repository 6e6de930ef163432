"""Captions of pictures: `POST /v1/chat/completions` as OpenAI has it, and `POST /v1/captions`.

For the second `curl -F image=@photo.jpg` is enough.

A chat completion as server-sent events, in OpenAI's order.

    policy.stream: Served, Delta, Delta, … ──▶ head of the answer, a role for each choice, texts, finish reasons,
                                               usage if asked for, [DONE]

The head waits for `Served`: a request that is refused gets its own status, and the version is in a header.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from mmrl_ray.data.images import image_hash
from mmrl_ray.errors import ServingError
from mmrl_ray.serving.auth import caller_id
from mmrl_ray.serving.http_errors import CLIENT_GONE, about, error_body, is_expected
from mmrl_ray.serving.openai import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    ChoiceDelta,
    ChunkChoice,
    ImagePart,
    Logprobs,
    Reply,
    Sampled,
    Usage,
    finite_logprob,
)
from mmrl_ray.serving.protocols import Choice, Delta, GenerateRequest, Served, ServedFinishReason, Turn
from mmrl_ray.serving.routes.common import (
    VERSION_HEADER,
    Tools,
    at_most,
    for_client,
    is_json,
    json_answer,
    read_form,
    read_json,
    takes_json,
)

_OPENAI_TEMPERATURE = 1.0


def add_chat(router: APIRouter, tools: Tools) -> None:
    """Adds `POST /v1/chat/completions`."""

    @router.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        summary="Complete a conversation with images",
        **takes_json(ChatRequest),
    )
    async def chat_completions(request: Request) -> Response:
        body = await read_json(request, ChatRequest, tools.timeout_s)
        deadline = time.monotonic() + tools.timeout_s
        async with for_client(request.receive, tools.timeout_s):
            asked = await _generate_request(tools, body, caller_id(request))
            if not body.stream:
                with about("messages"):
                    made = await tools.deps.policy.generate(asked)
        if body.stream:
            return ChatStream(tools, asked, body, deadline)
        served, choices = made.served, sorted(made.choices, key=lambda choice: choice.index)
        written = sum(len(choice.tokens) for choice in choices)
        tools.metrics.generated(served.prompt_tokens, written)
        answer = ChatCompletion(
            id=asked.id,
            created=int(time.time()),
            model=served.model,
            choices=[
                ChatChoice(
                    index=choice.index,
                    message=AnswerMessage(content=choice.text),
                    logprobs=Logprobs.of(choice.tokens) if body.logprobs else None,
                    finish_reason=choice.finish_reason,
                )
                for choice in choices
            ],
            usage=Usage.of(served.prompt_tokens, written),
            system_fingerprint=f"{served.model}@{served.version}",
        )
        return json_answer(answer, served.version)


async def _generate_request(tools: Tools, body: ChatRequest, caller: str | None) -> GenerateRequest:
    """Everything is counted before the first picture is looked at."""
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    sampling = tools.sampling(body, max_tokens=body.token_limit, temperature=_OPENAI_TEMPERATURE, name=name)
    at_most("messages", len(body.messages), tools.limits.max_messages, "messages")
    urls: list[str] = []
    places: list[str] = []
    turns = []
    characters = 0
    for i, message in enumerate(body.messages):
        parts: list[str | int] = []
        for j, part in enumerate(message.parts):
            if isinstance(part, ImagePart):
                parts.append(len(urls))
                urls.append(part.image_url.url)
                places.append(f"messages[{i}].content[{j}].image_url.url")
            else:
                characters += len(part.text)
                parts.append(part.text)
        turns.append(Turn(message.turn_role, tuple(parts)))
    at_most("messages", len(urls), tools.limits.max_images, "images")
    at_most("messages", characters, tools.limits.max_text_chars, "characters")
    return GenerateRequest(
        id=f"chatcmpl-{secrets.token_hex(12)}",
        model=body.model,
        turns=tuple(turns),
        images=await tools.pictures.at(urls, places, caller),
        sampling=sampling,
        n=body.n or 1,
        caller=caller,
    )


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
        """Sends the head once `Served` is there, then the events."""
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


class CaptionFields(Sampled):
    """What may be said beside the picture."""

    model: str | None = None
    """By default what the server was started with."""
    prompt: str | None = None
    """By default the server's."""
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    """By default 0 for one caption, and 1 for several, which would be the same otherwise."""


class CaptionRequest(CaptionFields):
    """`POST /v1/captions` as JSON."""

    image: str
    """`data:image/png;base64,…`, or an `https://` URL where the server allows it."""


class Caption(BaseModel):
    """One of them."""

    index: int
    text: str
    finish_reason: ServedFinishReason
    logprob: float
    """Of the whole caption, under the distribution it was drawn from."""


class Captions(Reply):
    """The answer."""

    id: str
    object: Literal["caption"] = "caption"
    created: int
    model: str
    version: int
    """Training step of the weights that answered."""
    image_hash: str
    """Hex SHA-256 of the file that was sent."""
    captions: list[Caption]
    usage: Usage


_FORM: dict[str, Any] = {
    "type": "object",
    "required": ["image"],
    "additionalProperties": False,
    "properties": {
        "image": {"type": "string", "format": "binary"},
        "model": {"type": "string"},
        "prompt": {"type": "string"},
        "n": {"type": "integer", "minimum": 1},
        "temperature": {"type": "number", "minimum": 0, "maximum": 2},
        "top_p": {"type": "number", "minimum": 0, "maximum": 1},
        "top_k": {"type": "integer", "minimum": -1},
        "max_tokens": {"type": "integer", "minimum": 1},
        "min_tokens": {"type": "integer", "minimum": 0},
        "seed": {"type": "integer"},
        "stop": {"type": "string"},
    },
}


def add_captions(router: APIRouter, tools: Tools) -> None:
    """Adds `POST /v1/captions`."""

    @router.post(
        "/v1/captions", response_model=Captions, summary="Caption a picture", **takes_json(CaptionRequest, _FORM)
    )
    async def captions(request: Request) -> Response:
        fields, upload = await _read(tools, request)
        n = fields.n or 1
        sampling = tools.sampling(fields, max_tokens=fields.max_tokens, temperature=0.0 if n == 1 else 1.0)
        prompt = tools.deps.prompt if fields.prompt is None else fields.prompt
        at_most("prompt", len(prompt), tools.limits.max_text_chars, "characters")
        caller = caller_id(request)
        async with for_client(request.receive, tools.timeout_s):
            if isinstance(fields, CaptionRequest):
                images = await tools.pictures.at([fields.image], ["image"], caller)
            else:
                images = (await tools.pictures.uploaded(upload, caller),)
            asked = GenerateRequest(
                id=f"caption-{secrets.token_hex(12)}",
                model=fields.model or tools.deps.default_model or await _first_model(tools),
                turns=(Turn("user", (0, prompt)),),
                images=images,
                sampling=sampling,
                n=n,
                caller=caller,
            )
            with about("prompt", image="image"):
                made = await tools.deps.policy.generate(asked)
        written = sum(len(choice.tokens) for choice in made.choices)
        tools.metrics.generated(made.served.prompt_tokens, written)
        answer = Captions(
            id=asked.id,
            created=int(time.time()),
            model=made.served.model,
            version=made.served.version,
            image_hash=image_hash(images),
            captions=[_caption(choice) for choice in sorted(made.choices, key=lambda choice: choice.index)],
            usage=Usage.of(made.served.prompt_tokens, written),
        )
        return json_answer(answer, made.served.version)


async def _read(tools: Tools, request: Request) -> tuple[CaptionFields, bytes]:
    if is_json(request):
        return await read_json(request, CaptionRequest, tools.timeout_s), b""
    return await read_form(request, CaptionFields, "image", tools.timeout_s, tools.pictures.limits.max_bytes)


async def _first_model(tools: Tools) -> str:
    models = await tools.deps.policy.models()
    if not models:
        raise ServingError("the policy serves no model")
    return models[0].id


def _caption(choice: Choice) -> Caption:
    return Caption(
        index=choice.index,
        text=choice.text,
        finish_reason=choice.finish_reason,
        logprob=sum(finite_logprob(token.logprob) for token in choice.tokens),
    )
