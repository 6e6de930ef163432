"""`POST /v1/captions`: a picture in, captions out; `curl -F image=@photo.jpg` is enough."""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, Field

from mmrl_ray.data.images import image_hash
from mmrl_ray.errors import ServingError
from mmrl_ray.serving.auth import INFER, caller_id
from mmrl_ray.serving.http_errors import about
from mmrl_ray.serving.openai import Sampled, Usage, finite_logprob
from mmrl_ray.serving.protocols import Choice, GenerateRequest, ServedFinishReason, Turn
from mmrl_ray.serving.routes.common import (
    Tools,
    at_most,
    for_client,
    is_json,
    json_answer,
    read_form,
    read_json,
    takes_json,
)


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


class Captions(BaseModel):
    """The answer."""

    id: str
    object: Literal["caption"]
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


def add_captions(app: FastAPI, tools: Tools) -> None:
    """The route."""

    @app.post(
        "/v1/captions",
        response_model=Captions,
        tags=["policy"],
        dependencies=[INFER],
        summary="Caption a picture",
        **takes_json(CaptionRequest, _FORM),
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
            object="caption",
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
