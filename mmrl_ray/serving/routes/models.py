"""`GET /v1/models`, and one of them."""

from __future__ import annotations

import asyncio

from fastapi import FastAPI, Response

from mmrl_ray.errors import UnknownModelError
from mmrl_ray.serving.auth import INFER
from mmrl_ray.serving.openai_answers import ModelCard, ModelList
from mmrl_ray.serving.protocols import ModelInfo
from mmrl_ray.serving.routes.documents import json_answer
from mmrl_ray.serving.routes.tools import Tools

_OWNER = "mmrl_ray"


def add_models(app: FastAPI, tools: Tools) -> None:
    """Both routes."""

    async def served() -> list[ModelInfo]:
        async with asyncio.timeout(tools.timeout_s):
            return await tools.deps.policy.models()

    @app.get(
        "/v1/models",
        response_model=ModelList,
        tags=["policy"],
        dependencies=[INFER],
        summary="Models and adapters that can be asked for",
    )
    async def models() -> Response:
        return json_answer(ModelList(object="list", data=[_card(info) for info in await served()]))

    @app.get(
        "/v1/models/{model}", response_model=ModelCard, tags=["policy"], dependencies=[INFER], summary="One of them"
    )
    async def model(model: str) -> Response:
        for info in await served():
            if info.id == model:
                return json_answer(_card(info), info.version)
        raise UnknownModelError(f"no model {model[:64]!r} is served here: GET /v1/models lists those that are")


def _card(info: ModelInfo) -> ModelCard:
    return ModelCard(
        id=info.id,
        object="model",
        created=info.created,
        owned_by=_OWNER,
        root=info.root,
        parent=info.parent,
        step=info.version,
    )
