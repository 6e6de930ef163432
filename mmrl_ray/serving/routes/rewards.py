"""`POST /v1/rewards`: what captions earn, part by part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, Field, model_validator

from mmrl_ray.errors import RewardError
from mmrl_ray.experience.breakdown import RewardBreakdown, RewardFailure, Score
from mmrl_ray.serving.auth import INFER, caller_id
from mmrl_ray.serving.http_errors import problem, wrong_parameter
from mmrl_ray.serving.openai import Strict
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


class CaptionError(BaseModel):
    """Why one caption has no reward."""

    code: Literal["reward_failed"]
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


class Rewards(BaseModel):
    """All of them, in the order of inputs and captions."""

    object: Literal["list"]
    reward: str
    """Its parts with their weights."""
    version: str
    """Changes with whatever can change a score."""
    data: list[PictureRewards]


def add_rewards(app: FastAPI, tools: Tools) -> None:
    """The route."""

    @app.post(
        "/v1/rewards",
        response_model=Rewards,
        tags=["reward"],
        dependencies=[INFER],
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
    """The reward behind this gateway.

    Raises:
        HTTPException: 404, there is none.
    """
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
    """Counts captions, references and the characters of each.

    Raises:
        HTTPException: 400, too many or too long.
    """
    limits = tools.limits
    at_most("captions", sum(len(captions) for captions, _, _ in inputs), limits.max_captions, "captions")
    for captions, references, prompt in inputs:
        at_most("references", len(references), limits.max_references, "references")
        for name, texts in (("captions", captions), ("references", references), ("prompt", [prompt])):
            at_most(name, max(map(len, texts), default=0), limits.max_text_chars, "characters")


def _answer(scored: Scored) -> Rewards:
    pictures = zip(scored.scores, scored.image_hashes, strict=True)
    return Rewards(
        object="list",
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
        error = CaptionError(code="reward_failed", message=score.reason)
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
