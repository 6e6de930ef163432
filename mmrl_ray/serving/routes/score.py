"""`POST /v1/score` in vLLM's shape: one number a pair.

Here a query is a picture with its references, and a document is a caption of it.
"""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Any, Literal, Self

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from mmrl_ray.config.serving import REWARD
from mmrl_ray.errors import RewardError, UnknownModelError
from mmrl_ray.experience.breakdown import RewardBreakdown, RewardFailure, Score
from mmrl_ray.serving.auth import INFER, caller_id
from mmrl_ray.serving.http_errors import TAG, problem
from mmrl_ray.serving.openai import ImagePart, Part, Strict, Usage
from mmrl_ray.serving.protocols import RewardItem
from mmrl_ray.serving.routes.common import Tools, at_most, for_client, json_answer, read_json, takes_json
from mmrl_ray.serving.routes.rewards import check_texts, score_items, served_reward


class MultimodalInput(Strict):
    """Texts and pictures together."""

    content: Annotated[list[Part], Field(min_length=1, fail_fast=True)]


def _tag(value: Any) -> str:
    if isinstance(value, list):
        return TAG + "list"
    return TAG + ("text" if isinstance(value, str) else "content")


One = Annotated[
    Annotated[str, Tag(TAG + "text")] | Annotated[MultimodalInput, Tag(TAG + "content")], Discriminator(_tag)
]
Side = Annotated[
    Annotated[str, Tag(TAG + "text")]
    | Annotated[MultimodalInput, Tag(TAG + "content")]
    | Annotated[list[One], Field(fail_fast=True), Tag(TAG + "list")],
    Discriminator(_tag),
]
_NAMES = (("queries", "documents"), ("text_1", "text_2"), ("data_1", "data_2"))


class ScoreRequest(Strict):
    """One query for one or several documents, or as many of both; under newer or older names."""

    model: str | None = None
    """`reward`, or what an answer calls it."""
    queries: Side | None = None
    """Text parts are references of the picture; a text alone is one reference."""
    documents: Side | None = None
    """Captions."""
    text_1: Side | None = None
    text_2: Side | None = None
    data_1: Side | None = None
    data_2: Side | None = None
    user: Any = None
    """Taken and ignored."""

    @model_validator(mode="after")
    def _one_pair(self) -> Self:
        sent = {name for pair in _NAMES for name in pair if getattr(self, name) is not None}
        if not any(sent == set(pair) for pair in _NAMES):
            raise ValueError("send `queries` and `documents` (or `text_1` and `text_2`, or `data_1` and `data_2`)")
        queries, documents = len(self.sides[0]), len(self.sides[1])
        if not documents or queries not in (1, documents):
            raise ValueError(f"{queries} queries and {documents} documents: send one query, or as many as documents")
        return self

    @property
    def sides(self) -> tuple[list[str | MultimodalInput], list[str | MultimodalInput]]:
        """Queries and documents, always as several."""
        for pair in _NAMES:
            left, right = (getattr(self, name) for name in pair)
            if left is not None and right is not None:
                return _several(left), _several(right)
        raise AssertionError("one pair was sent")


class ScoreOfPair(BaseModel):
    """One number."""

    index: int
    object: Literal["score"]
    score: float


class Scores(BaseModel):
    """One for each document."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ScoreOfPair]
    usage: Usage
    """All 0: the reward has no tokens of its own."""


def add_score(app: FastAPI, tools: Tools) -> None:
    """The route."""

    @app.post(
        "/v1/score",
        response_model=Scores,
        tags=["reward"],
        dependencies=[INFER],
        summary="Score captions as vLLM does",
        **takes_json(ScoreRequest),
    )
    async def score(request: Request) -> Response:
        service = served_reward(tools)
        body = await read_json(request, ScoreRequest, tools.timeout_s)
        queries, documents = body.sides
        references, urls = zip(*map(_texts_and_urls, queries), strict=True)
        captions = [_caption(document) for document in documents]
        at_most("queries", max(map(len, urls)), tools.limits.max_images, "images")
        check_texts(tools, [(captions, [], ""), *(([], texts, "") for texts in references)])
        # One query holds all captions of its picture; several hold one each.
        groups = [tuple(captions)] if len(queries) == 1 else [(caption,) for caption in captions]
        at_most("queries", sum(map(len, urls)), tools.limits.max_scored_images, "images")
        async with for_client(request.receive, tools.timeout_s):
            pictures = await tools.pictures.decoded(urls, ["queries"] * len(urls), caller_id(request))
            items = [
                RewardItem(images, group, tuple(texts))
                for images, group, texts in zip(pictures, groups, references, strict=True)
            ]
            scored = await score_items(tools, service, items)
        if body.model not in (None, REWARD, scored.reward):
            raise UnknownModelError(f"no reward {body.model[:64]!r} is served here: send `{REWARD}`, or no model")
        totals = _totals([score for scores in scored.scores for score in scores])
        answer = Scores(
            id=f"score-{secrets.token_hex(12)}",
            object="list",
            created=int(time.time()),
            model=scored.reward,
            data=[ScoreOfPair(index=i, object="score", score=total) for i, total in enumerate(totals)],
            usage=Usage.of(0, 0),
        )
        return json_answer(answer)


def _totals(scores: list[Score]) -> list[float]:
    """vLLM's shape has a number for every document, and no place for an error of one.

    Raises:
        RewardError: a document has no reward.
    """
    for index, score in enumerate(scores):
        if isinstance(score, RewardFailure):
            raise RewardError(f"document {index} has no reward: {score.reason} (/v1/rewards has an error a caption)")
    return [score.total for score in scores if isinstance(score, RewardBreakdown)]


def _several(side: str | MultimodalInput | list[str | MultimodalInput]) -> list[str | MultimodalInput]:
    return side if isinstance(side, list) else [side]


def _texts_and_urls(one: str | MultimodalInput) -> tuple[list[str], list[str]]:
    if isinstance(one, str):
        return [one], []
    texts = [part.text for part in one.content if not isinstance(part, ImagePart)]
    return texts, [part.image_url.url for part in one.content if isinstance(part, ImagePart)]


def _caption(document: str | MultimodalInput) -> str:
    texts, urls = _texts_and_urls(document)
    if urls:
        raise problem(
            400,
            "documents: a document is a caption, and its picture belongs into the query",
            code="invalid_value",
            param="documents",
        )
    return "".join(texts)
