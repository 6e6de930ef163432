"""`POST /v1/chat/completions`."""

from __future__ import annotations

import secrets
import time

from fastapi import FastAPI, Request, Response

from mmrl_ray.serving.auth import INFER, caller_id
from mmrl_ray.serving.http_errors import about
from mmrl_ray.serving.openai_answers import AnswerMessage, ChatChoice, ChatCompletion, Logprobs, Usage
from mmrl_ray.serving.openai_types import ChatRequest, ImagePart
from mmrl_ray.serving.protocols import GenerateRequest, Turn
from mmrl_ray.serving.routes.body import read_json
from mmrl_ray.serving.routes.chat_stream import ChatStream
from mmrl_ray.serving.routes.documents import json_answer, takes_json
from mmrl_ray.serving.routes.tools import Tools, at_most
from mmrl_ray.serving.routes.work import for_client

_OPENAI_TEMPERATURE = 1.0


def add_chat(app: FastAPI, tools: Tools) -> None:
    """The route."""

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        tags=["policy"],
        dependencies=[INFER],
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
            object="chat.completion",
            created=int(time.time()),
            model=served.model,
            choices=[
                ChatChoice(
                    index=choice.index,
                    message=AnswerMessage(role="assistant", content=choice.text, refusal=None),
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
