"""What captions earn: `POST /v1/rewards`, part by part, and `POST /v1/score` in vLLM's shape, one number a pair.

In the latter a query is a picture with its references, and a document is a caption of it.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from mmrl_ray.config.serving import REWARD
from mmrl_ray.errors import RewardError, UnknownModelError
from mmrl_ray.experience.carriers import RewardBreakdown, RewardFailure, Score
from mmrl_ray.serving.auth import caller_id
from mmrl_ray.serving.http_errors import TAG, problem, wrong_parameter
from mmrl_ray.serving.openai import ImagePart, Part, Reply, Strict, Usage
from mmrl_ray.serving.protocols import RewardItem, RewardService, Scored
from mmrl_ray.serving.routes.common import Tools, at_most, for_client, json_answer, read_json, takes_json


class RewardInput(Strict):
    """Captions of one picture."""

    captions: Annotated[list[str], Field(min_length=1, fail_fast=True)]
    image: str | None = None
    """`data:image/png;base64,…`, or an `https://` URL where the server allows it. May be left out where no part of the
    reward looks at it."""
    image_hash: Annotated[str | None, Field(pattern=r"^[0-9a-f]{64}$")] = None
    """In place of `image`: the hash that an earlier answer gave it."""
    references: Annotated[list[str], Field(default_factory=list, fail_fast=True)]
    prompt: str = ""

    @model_validator(mode="after")
    def _one_image(self) -> Self:
        if self.image is not None and self.image_hash is not None:
            raise wrong_parameter("image_hash", "it names the same picture as image: send one of them")
        return self


class RewardRequest(Strict):
    """`POST /v1/rewards`: several inputs, or one whose keys stand at the top."""

    inputs: Annotated[list[RewardInput] | None, Field(min_length=1, fail_fast=True)] = None
    captions: Annotated[list[str] | None, Field(min_length=1, fail_fast=True)] = None
    image: str | None = None
    image_hash: Annotated[str | None, Field(pattern=r"^[0-9a-f]{64}$")] = None
    references: list[str] | None = None
    prompt: str | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        top = self.model_fields_set - {"inputs"}
        if (self.inputs is None) == (self.captions is None) or (self.inputs is not None and top):
            raise ValueError("send either `inputs`, or `captions` with what belongs to them")
        if self.image is not None and self.image_hash is not None:
            raise wrong_parameter("image_hash", "it names the same picture as image: send one of them")
        return self

    @property
    def items(self) -> list[RewardInput]:
        """Always as several."""
        if self.inputs is not None:
            return self.inputs
        given: dict[str, Any] = self.model_dump(exclude_none=True)
        return [RewardInput(**given)]


class CaptionError(Reply):
    """Why one caption has no reward."""

    code: Literal["reward_failed"] = "reward_failed"
    message: str


class CaptionReward(BaseModel):
    """What one caption earned, or why nobody knows: then it has an `error`, no total and no parts."""

    index: int
    total: float | None
    parts: dict[str, float]
    weights: dict[str, float]
    sigma: float | None
    """Standard deviation of the total where the reward has a model of its own noise."""
    missing: dict[str, str]
    """Parts of weight 0 that could not score the caption, each with its reason."""
    error: CaptionError | None


class PictureRewards(BaseModel):
    """What the captions of one input earned."""

    index: int
    image_hash: str | None
    """Names the picture in later requests, as long as the reward remembers it."""
    rewards: list[CaptionReward]


class Rewards(Reply):
    """All of them, in the order of inputs and captions."""

    object: Literal["list"] = "list"
    reward: str
    """Its parts with their weights."""
    version: str
    """Changes with whatever can change a score."""
    data: list[PictureRewards]


def add_rewards(router: APIRouter, tools: Tools) -> None:
    """Adds `POST /v1/rewards`."""

    @router.post(
        "/v1/rewards",
        response_model=Rewards,
        summary="Score captions of pictures",
        description="A caption that cannot be scored has an `error` of its own, and the answer is 200 all the same, "
        "also where none can be. An error of the request says that nothing was scored.",
        **takes_json(RewardRequest),
    )
    async def rewards(request: Request) -> Response:
        service = served_reward(tools)
        body = await read_json(request, RewardRequest, tools.timeout_s)
        inputs = body.items
        check_texts(tools, [(item.captions, item.references, item.prompt) for item in inputs])
        urls = [[] if item.image is None else [item.image] for item in inputs]
        places = ["image" if body.inputs is None else f"inputs[{i}].image" for i in range(len(inputs))]
        at_most("inputs", sum(map(len, urls)), tools.limits.max_scored_images, "images")
        async with for_client(request.receive, tools.timeout_s):
            pictures = await tools.pictures.decoded(urls, places, caller_id(request))
            items = [
                RewardItem(images, tuple(item.captions), tuple(item.references), item.prompt, item.image_hash)
                for item, images in zip(inputs, pictures, strict=True)
            ]
            scored = await score_items(tools, service, items)
        return json_answer(_answer(scored))


def served_reward(tools: Tools) -> RewardService:
    """The reward behind this gateway; 404 where there is none."""
    if tools.deps.reward is None:
        raise problem(404, "no reward is served here", code="reward_not_served")
    return tools.deps.reward


async def score_items(tools: Tools, service: RewardService, items: Sequence[RewardItem]) -> Scored:
    """Scores of which there are as many as captions, each of them numbers or a failure.

    Raises:
        RewardError: there are not, or whatever `RewardService.score` says.
    """
    scored = await service.score(tuple(items))
    asked, given = [len(item.captions) for item in items], [len(each) for each in scored.scores]
    if asked != given:
        raise RewardError(f"reward {scored.reward!r} gave {given} scores for {asked} captions")
    for number, scores in enumerate(scored.scores):
        for index, breakdown in enumerate(scores):
            if isinstance(breakdown, RewardFailure):
                continue
            numbers = (breakdown.total, breakdown.sigma or 0.0, *breakdown.parts.values(), *breakdown.weights.values())
            if not all(map(math.isfinite, numbers)):
                raise RewardError(f"reward {scored.reward!r} gave caption {index} of input {number} no finite number")
    tools.metrics.scored(sum(isinstance(score, RewardBreakdown) for scores in scored.scores for score in scores))
    return scored


def check_texts(tools: Tools, inputs: list[tuple[list[str], list[str], str]]) -> None:
    """Counts captions, references and the characters of each; 400 where they are too many or too long."""
    limits = tools.limits
    at_most("captions", sum(len(captions) for captions, _, _ in inputs), limits.max_captions, "captions")
    for captions, references, prompt in inputs:
        at_most("references", len(references), limits.max_references, "references")
        for name, texts in (("captions", captions), ("references", references), ("prompt", [prompt])):
            at_most(name, max(map(len, texts), default=0), limits.max_text_chars, "characters")


def _answer(scored: Scored) -> Rewards:
    pictures = zip(scored.scores, scored.image_hashes, strict=True)
    return Rewards(
        reward=scored.reward,
        version=scored.version,
        data=[
            PictureRewards(
                index=number,
                image_hash=image_hash,
                rewards=[_caption(index, score) for index, score in enumerate(scores)],
            )
            for number, (scores, image_hash) in enumerate(pictures)
        ],
    )


def _caption(index: int, score: Score) -> CaptionReward:
    if isinstance(score, RewardFailure):
        error = CaptionError(message=score.reason)
        return CaptionReward(index=index, total=None, parts={}, weights={}, sigma=None, missing={}, error=error)
    return CaptionReward(
        index=index,
        total=score.total,
        parts=dict(score.parts),
        weights=dict(score.weights),
        sigma=score.sigma,
        missing=dict(score.missing),
        error=None,
    )


class MultimodalInput(Strict):
    """Texts and pictures together."""

    content: Annotated[list[Part], Field(min_length=1, fail_fast=True)]


def _tag(value: Any) -> str:
    return TAG + ("list" if isinstance(value, list) else "text" if isinstance(value, str) else "content")


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


class ScoreOfPair(Reply):
    """One number."""

    index: int
    object: Literal["score"] = "score"
    score: float


class Scores(Reply):
    """One for each document."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ScoreOfPair]
    usage: Usage
    """All 0: the reward has no tokens of its own."""


def add_score(router: APIRouter, tools: Tools) -> None:
    """Adds `POST /v1/score`."""

    @router.post("/v1/score", response_model=Scores, summary="Score captions as vLLM does", **takes_json(ScoreRequest))
    async def score(request: Request) -> Response:
        service = served_reward(tools)
        body = await read_json(request, ScoreRequest, tools.timeout_s)
        queries, documents = body.sides
        references, urls = zip(*map(_texts_and_urls, queries), strict=True)
        captions = [_caption_of(document) for document in documents]
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
            created=int(time.time()),
            model=scored.reward,
            data=[ScoreOfPair(index=i, score=total) for i, total in enumerate(totals)],
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


def _caption_of(document: str | MultimodalInput) -> str:
    texts, urls = _texts_and_urls(document)
    if urls:
        raise problem(
            400,
            "documents: a document is a caption, and its picture belongs into the query",
            code="invalid_value",
            param="documents",
        )
    return "".join(texts)
